"""All weights in one place: by the engine, from a checkpoint, and what DeepSpeed's own converters say to it."""

import shutil
from pathlib import Path

import numpy as np
import torch
from deepspeed.checkpoint.deepspeed_checkpoint import DeepSpeedCheckpoint
from deepspeed.checkpoint.ds_to_universal import _check_for_required_state
from deepspeed.utils import zero_to_fp32
from pytest import raises

from mocte_ds.checkpoints.fp32 import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from mocte_ds.checkpoints.inspection import checkpoint_facts
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError, MocteError
from mocte_ds.moe import attach
from tests.checkpoints import runs, writers
from tests.checkpoints.loaded import load_model
from tests.spawn import spawn
from tools.zero_to_fp32 import main


def test_the_engine_gives_the_experts_of_all_ranks(tmp_path):
    results = spawn(writers.write_and_load, 2, str(tmp_path), timeout=150, deepspeed=True)
    for result in results:
        assert all(result["same"].values()), result["same"]
        errors = result["errors"]
        assert "experts of one of 2 ranks. For all weights call engine.save_16bit_model" in errors["module_state_dict"]
        assert "name a checkpoint" in errors["empty tag"]
        assert "frozen experts would be lost" in errors["frozen left out"]
        assert "could not write /dev/full/x/pytorch_model.bin" in errors["no room"]
        assert "thesis.bin was not written by mocte-ds" in errors["of the user"]
    assert not (tmp_path / "left").exists()
    assert (tmp_path / "mine" / "thesis.bin").read_text() == "the only copy"
    found = torch.load(tmp_path / "w[*]" / "all.bin", weights_only=True)
    own = {**results[1]["weights"], **results[0]["weights"]}
    # One of two blocks has emerged.
    assert found.keys() == own.keys() and sum("deepspeed_experts" in name for name in found) == 4 * 3
    assert all(np.array_equal(tensor.float().numpy(), own[name]) for name, tensor in found.items())
    assert {tensor.dtype for name, tensor in found.items() if "gate.key" not in name} == {torch.bfloat16}
    trained = torch.load(tmp_path / "w[*]" / "trained.bin", weights_only=True)
    left_out = found.keys() - trained.keys()
    assert any(".deepspeed_experts.1." in name for name in left_out), "the frozen expert of block 0"
    assert all("deepspeed_experts" in name for name in left_out) and not any("0.mlp.dense." in name for name in found)


def test_master_weights_of_all_ranks(written, tmp_path):
    """Rounded to bf16 they are the trained weights, bit by bit; the frozen expert's are those themselves."""
    found = get_fp32_state_dict_from_zero_checkpoint(written.folder / "ffn")
    folder = find_tag(written.folder / "ffn")
    stored = dict(torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"])
    for path in folder.glob("layer_*"):
        stored.update(torch.load(path, weights_only=True))
    assert found.keys() == stored.keys() and {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, tensor in found.items():
        assert torch.equal(tensor.to(stored[name].dtype), stored[name]), name
    experts = [name for name in found if "deepspeed_experts" in name]
    finer = {name for name in experts if not torch.equal(found[name], stored[name].float())}
    assert len(experts) == 24 and not any(
        "0.mlp.banks.0.deepspeed_moe.experts.deepspeed_experts.1." in n for n in finer
    )
    assert len(finer) == 21
    model = runs.model()
    attach(model, MocteConfig.from_dict({**runs.config()["mocte"], "ep_size": 1}))
    load_state_dict_from_zero_checkpoint(model, written.folder / "ffn")
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    with raises(CheckpointError, match="the model has \\[\\]"):
        load_state_dict_from_zero_checkpoint(torch.nn.Linear(2, 2), written.folder / "ffn")
    assert main([str(written.folder / "ffn"), str(tmp_path / "out"), "--tag", folder.name]) == 0
    loaded = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items()) and loaded.keys() == found.keys()
    with raises(CheckpointError, match="is there already"):
        main([str(written.folder / "ffn"), str(tmp_path / "out")])
    victim = tmp_path / "mine" / "pytorch_model.bin"
    victim.parent.mkdir()
    victim.write_text("the only copy")
    with raises(MocteError, match="pytorch_model.bin"):
        main([str(written.folder / "ffn"), str(victim.parent)])
    assert victim.read_text() == "the only copy" and len(list(victim.parent.iterdir())) == 1
    with raises(MocteError):
        main([str(written.folder / "ffn"), str(written.folder / "ffn")])
    assert not (written.folder / "ffn" / "pytorch_model.bin").exists()


def test_deepspeeds_own_converters(written):
    """Of a dense run they read everything; at experts they stop and say what to use."""
    wanted = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(written.folder / "dense"))
    found = get_fp32_state_dict_from_zero_checkpoint(written.folder / "dense")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with raises(ValueError, match="USE_mocte-ds_zero_to_fp32_INSTEAD"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(written.folder / "ffn"))
    with raises(ValueError, match=r"deepspeed_experts: mocte_ds takes checkpoints to another .* tools/reshape.py"):
        _check_for_required_state(DeepSpeedCheckpoint(str(find_tag(written.folder / "ffn"))))


def test_names_that_look_like_patterns(written, tmp_path):
    """Every reader takes the folder that it was given, and nothing of the one that the pattern would match."""
    here, other = tmp_path / "r[1]*?", tmp_path / "r1xx"
    shutil.copytree(written.folder / "ffn", here)
    shutil.copytree(written.folder / "lora", other)
    shutil.copytree(written.folder / "lora", tmp_path / "r1")
    facts = checkpoint_facts(here)
    assert facts["whole"] and facts["blocks"] == checkpoint_facts(written.folder / "ffn")["blocks"]
    reshape(here, tmp_path / "o[1]", 4, 4)
    assert checkpoint_facts(tmp_path / "o[1]")["sizes"]["experts"] == facts["sizes"]["experts"]
    wanted, _ = load_model(written.folder / "ffn")
    found, _ = load_model(here)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    # An expert too many is found by its name, in this folder only.
    folder = find_tag(Path(here))
    shutil.copy(next(folder.glob("layer_0_expert_0_*")), folder / "layer_9_expert_9_mp_rank_00_model_states.pt")
    with raises(CheckpointError, match="layer_9_expert_9"):
        load_model(here)
    load_model(other)
