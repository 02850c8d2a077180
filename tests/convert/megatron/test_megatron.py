"""A checkpoint becomes a folder that megatron-core loads by itself, and comes back; what cannot is refused by name."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from pytest import fixture, mark, raises
from torch import distributed, nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.planner import WriteItemType
from transformers import LlamaConfig

from mocte_ds.base_model import base_facts
from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.convert.megatron import convert
from mocte_ds.convert.megatron.base_config import arguments_of
from mocte_ds.convert.megatron.convert import from_megatron, to_megatron
from mocte_ds.convert.megatron.folder import TensorLists
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe.block import Block
from tests.checkpoints.by_hand import sign, write_random
from tests.checkpoints.loaded import load_model
from tests.convert.hf.test_export import digest
from tests.convert.megatron.in_megatron import PADDED, look, save_surplus
from tests.small_models import FFNS, small_model
from tests.spawn import spawn
from tools import to_megatron as tool

ROOT = Path(__file__).resolve().parents[3]
ALL, VOCAB = "model.layers.*.mlp", 96
SOFTMAX = {"kind": "token", "bias": False, "weight": "softmax"}

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
SOME_LAYERS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "head_dim": 8}

# Name: keys of the model's config, "mocte" block, blocks that stay in warm-up.
CASES = {
    "hard": ({}, {"modules": ALL, "router": {"kind": "token", "bias": False}}, ()),
    "softmax": ({}, {"modules": ALL, "router": SOFTMAX}, ()),
    "some layers, tied": ({"tie_word_embeddings": True}, {"modules": ["model.layers.1.mlp"], "router": SOFTMAX}, ()),
    "a block in warm-up, all kv heads": (
        {"num_key_value_heads": 4},
        {"modules": ALL, "router": {"kind": "token", "bias": False}},
        (0,),
    ),
    "biases of queries, wide heads": ({"style": "qwen2", "head_dim": 12}, {"modules": ALL, "router": SOFTMAX}, ()),
    "learned": ({}, {"modules": ALL, "router": {"kind": "random", "weight": "softmax", "learn": True}}, ()),
    "two a token, positions of Llama 3": (
        {"rope_parameters": LLAMA3},
        {"modules": ALL, "router": {**SOFTMAX, "top_k": 2}},
        (),
    ),
    "two as in Mixtral, slower positions": (
        {"rope_parameters": LINEAR, "rms_norm_eps": 0.01},
        {"modules": ALL, "router": {**SOFTMAX, "top_k": 2, "normalise": True}},
        (),
    ),
    "mistral, a window": ({"style": "mistral", "sliding_window": 7}, {"modules": ALL, "router": SOFTMAX}, ()),
    "qwen3, a window in some layers": ({"style": "qwen3", **SOME_LAYERS}, {"modules": ALL, "router": SOFTMAX}, ()),
    "dense": ({}, {"modules": ALL, "router": {"kind": "type"}}, (0, 1, 2)),
}


def write(folder: Path, sizes: dict, block: dict, warmup: tuple[int, ...] = ()) -> Path:
    """A random checkpoint of three layers with four experts each, features of 32, 4 heads and 2 key/value heads."""
    fixed = {
        "style": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    with torch.device("meta"):
        model = small_model(vocab_size=VOCAB, layers=3, heads=4, positions=48, **{**fixed, **sizes})
    write_random(folder, model, {"base": base_facts(model)}, {"num_experts": 4, **block})
    path = folder / "mocte_state.pt"
    state = torch.load(path, weights_only=True)
    for number in warmup:
        state["mocte"]["blocks"][number]["mode"] = "warmup"
    torch.save(state, path)
    # Weights that make experts matter.
    for file in folder.glob("*model_states.pt"):
        content = torch.load(file, weights_only=True)
        for name, value in content.get("module", content).items():
            if torch.is_tensor(value) and value.dim() == 2 and value.is_floating_point():
                value.mul_(1 if ".gate." in name else 5)
        torch.save(content, file)
    sign(folder)
    return folder


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(5))


@fixture(scope="module")
def converted(tmp_path_factory) -> SimpleNamespace:
    """Each case as a checkpoint, as a folder of megatron-core, and what megatron-core makes of it."""
    base = tmp_path_factory.mktemp("megatron")
    checkpoints = {name: write(base / name / "step7", *case) for name, case in CASES.items()}
    before = digest(base)
    folders, facts = {name: base / f"{name}, converted" for name in CASES}, {}
    for name, folder in folders.items():
        facts[name] = to_megatron(checkpoints[name], folder)
    assert before == {name: value for name, value in digest(base).items() if "converted" not in name}
    names = {name: str(folder) for name, folder in folders.items()}
    ranks = spawn(look, 2, names, ids(), str(base / "doubled"), timeout=100)
    return SimpleNamespace(checkpoints=checkpoints, folders=folders, facts=facts, ranks=ranks, doubled=base / "doubled")


def logits(checkpoint: Path) -> np.ndarray:
    model, _ = load_model(checkpoint)
    with torch.no_grad():
        return model(input_ids=ids()).logits.numpy()


@mark.parametrize("name", CASES)
def test_megatron_computes_what_was_trained(converted, name):
    expected = logits(converted.checkpoints[name])
    found = [rank[name] for rank in converted.ranks]
    layouts = ["ep 1"] if name == "dense" else ["ep 1", "ep 2"]
    for layout in layouts:
        for rank in found:
            assert np.abs(rank[layout] - expected).max() < 1e-5 * np.abs(expected).max(), layout
    facts = converted.facts[name]
    experts = {"dense": 0, "some layers, tied": 4, "a block in warm-up, all kv heads": 8}
    assert facts["experts_compared"] == experts.get(name, 12) and facts["logit_difference"] < 1e-5
    # Had two experts changed places, these ids would have shown it: each has tokens of them.
    model, _ = load_model(converted.checkpoints[name])
    rows: Counter[nn.Module] = Counter()
    for block in (layer.mlp for layer in model.model.layers if isinstance(layer.mlp, Block)):
        for expert in block.banks[0].local_experts:
            expert.register_forward_pre_hook(lambda expert, inputs: rows.update({expert: len(inputs[0])}))
    with torch.no_grad():
        model(input_ids=ids())
    assert sum(count > 0 for count in rows.values()) == facts["experts_compared"]
    for layer in model.model.layers:
        if hasattr(layer.mlp, "banks") and layer.mlp.mode != "warmup":
            expert = layer.mlp.banks[0].local_experts
            expert[0].down_proj.weight.data, expert[1].down_proj.weight.data = (
                expert[1].down_proj.weight.data,
                expert[0].down_proj.weight.data,
            )
            with torch.no_grad():
                assert np.abs(model(input_ids=ids()).logits.numpy() - expected).max() > 1e-2 * np.abs(expected).max()
            break


def test_parallelism_vocabulary_and_names_of_transformer_engine(converted):
    first, second = converted.ranks
    assert first["softmax"]["experts per rank"] == 2
    assert (first["softmax"]["engine"] == first["softmax"]["ep 1"]).all()
    padded, plain = first["dense"]["padded"], first["dense"]["ep 1"]
    assert padded.shape[-1] == PADDED and (padded[..., :VOCAB] == plain).all()
    assert (second["hard"]["ep 2"] == first["hard"]["ep 2"]).all()
    halves = [rank["dense"]["half of the vocabulary"] for rank in converted.ranks]
    assert np.abs(np.concatenate(halves, axis=-1) - plain).max() < 1e-5 * np.abs(plain).max()


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = CheckpointSource(checkpoint)
    return {name: source.read(name) for name in source.shapes}


@mark.parametrize("name", CASES)
def test_the_round_trip_changes_nothing(converted, name, tmp_path):
    before = digest(converted.folders[name])
    facts = from_megatron(converted.folders[name], tmp_path / "back")
    assert digest(converted.folders[name]) == before
    old, new = tensors(converted.checkpoints[name]), tensors(tmp_path / "back")
    assert old.keys() == new.keys() and facts["tensors_compared"] == len(old)
    for key, value in old.items():
        if name == "learned" and (key.endswith("cluster_weight") or key.endswith("cluster_residual")):
            continue  # the sum is kept, in the prior
        assert torch.equal(value, new[key]), key
    states = [CheckpointSource(folder).state for folder in (converted.checkpoints[name], tmp_path / "back")]
    assert states[0] == states[1] and facts["tag"] == "step7" and states[0]["tokens"] == 700
    expected = logits(converted.checkpoints[name])
    difference = np.abs(logits(tmp_path / "back") - expected).max()
    assert difference == 0 if name != "learned" else difference < 1e-5 * np.abs(expected).max()
    # And from there once more.
    if name == "hard":
        to_megatron(tmp_path / "back", tmp_path / "again")
        shutil.rmtree(tmp_path / "back")
        from_megatron(tmp_path / "again", tmp_path / "back")
        assert all(torch.equal(value, old[key]) for key, value in tensors(tmp_path / "back").items())


def test_a_run_without_blocks_comes_back(tmp_path):
    folder = write(tmp_path / "run" / "step7", {}, {"modules": ALL})
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    client = torch.load(folder / "mocte_state.pt", weights_only=True)["client_state"]
    shutil.rmtree(folder)
    folder.mkdir()
    module = {k.replace(".mlp.dense.", ".mlp."): v for k, v in content["module"].items() if ".banks." not in k}
    torch.save({**content, "module": module, **client}, folder / "mp_rank_00_model_states.pt")
    sign(folder)
    assert to_megatron(tmp_path / "run" / "step7", tmp_path / "out")["experts_compared"] == 0
    assert not (tmp_path / "out" / "mocte_ds" / "model.safetensors").exists()
    from_megatron(tmp_path / "out", tmp_path / "back")
    old, new = tensors(folder), tensors(tmp_path / "back")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_bf16_halves_the_files_and_keeps_the_router(converted, tmp_path):
    to_megatron(converted.checkpoints["hard"], tmp_path / "out", "bf16")
    sizes = [sum(p.stat().st_size for p in f.glob("*.distcp")) for f in (tmp_path / "out", converted.folders["hard"])]
    assert sizes[0] < 0.75 * sizes[1]
    from_megatron(tmp_path / "out", tmp_path / "back", "bf16")
    old, new = tensors(converted.checkpoints["hard"]), tensors(tmp_path / "back")
    for name, value in old.items():
        assert torch.equal(new[name], value if ".gate." in name else value.bfloat16().float()), name
    stored = torch.load(tmp_path / "back" / "step7" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert {v.dtype for k, v in stored.items() if ".gate." not in k} == {torch.bfloat16}


def test_what_megatron_trained_on_comes_back(converted, tmp_path):
    """Saved by two expert-parallel ranks of megatron-core, whose folder has nothing of ours in it."""
    with raises(CheckpointError, match="mocte_ds is missing.*with --settings"):
        from_megatron(converted.doubled, tmp_path / "back")
    started = converted.folders["softmax"]
    assert tool.main([str(converted.doubled), str(tmp_path / "back"), "--back", "--settings", str(started)]) == 0
    with raises(ConfigError, match="--settings belongs to the way back"):
        tool.main([str(converted.checkpoints["softmax"]), str(tmp_path / "out"), "--settings", str(started)])
    old, new = tensors(converted.checkpoints["softmax"]), tensors(tmp_path / "back")
    for name, value in old.items():
        dormant = ".mlp.dense." in name or name.endswith("cluster_bias")
        assert torch.equal(new[name], value if dormant else 2 * value), name


@mark.parametrize(
    ("style", "block", "message"),
    [
        ("llama", {"router": {"kind": "type"}}, "layers.0.mlp has the router.kind 'type', which.*router.kind 'token'"),
        ("llama", {"router": {"kind": "prefix", "bias": False}}, "the router.kind 'prefix'"),
        ("llama", {"router": {"kind": "hash"}}, "the router.kind 'hash'"),
        (
            "llama",
            {"expert": {"kind": "lora", "width": 12}, "router": {"kind": "token", "bias": False}},
            "experts of the kind 'lora'",
        ),
        ("llama", {"banks": [{"kind": "token"}, {"kind": "hash"}]}, "2 banks of experts"),
        (
            "gpt2",
            {"router": {"kind": "token", "bias": False}},
            "step7 cannot be converted to megatron-core: it holds a GPT2LMHeadModel",
        ),
        (
            "gemma",
            {"router": {"kind": "token", "bias": False}},
            "it holds a GemmaForCausalLM; these can be converted: LlamaForCausalLM",
        ),
    ],
)
def test_what_megatron_does_not_compute_is_refused(style, block, message, tmp_path):
    modules = FFNS.get(style, ALL)
    checkpoint = write(tmp_path / "run" / "step7", {"style": style}, {"modules": modules, **block})
    with raises(CheckpointError, match=message):
        to_megatron(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@mark.parametrize(
    ("keys", "message"),
    [
        (
            {"hidden_act": "gelu"},
            "step7 cannot be converted to megatron-core: hidden_act = 'gelu' of its config: 'silu'",
        ),
        ({"attention_bias": True}, "attention_bias = True of its config: False can be converted"),
        ({"mlp_bias": True}, "mlp_bias = True of its config"),
        ({"style": "qwen3", "attention_bias": True}, "attention_bias = True of its config"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_parameters.rope_type = 'dynamic'"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor = 0.5"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "rope_parameters.high_freq_factor = 8.0.* 4.0 can"),
        ({"style": "qwen2", "layer_types": ["chunked_attention"] * 3}, "layer_types = 'chunked_attention' of"),
        ({"style": "qwen2", "layer_types": ["sliding_attention"] * 3}, "sliding_window = None of its config"),
    ],
)
def test_keys_whose_values_megatron_does_not_compute_are_refused(keys, message, tmp_path):
    checkpoint = write(tmp_path / "run" / "step7", keys, {"modules": ALL, "router": {"kind": "token", "bias": False}})
    with raises(CheckpointError, match=message):
        to_megatron(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@dataclass
class _Later(LlamaConfig):
    """As a later version of transformers may have it."""

    final_logit_softcapping: float | None = None


def test_keys_that_are_new_are_refused_unless_they_have_their_default():
    assert arguments_of("LlamaForCausalLM", _Later()) == arguments_of("LlamaForCausalLM", LlamaConfig())
    with raises(CheckpointError, match="final_logit_softcapping = 30.0 of its config: this version of mocte_ds"):
        arguments_of("LlamaForCausalLM", _Later(final_logit_softcapping=30.0))
    with raises(CheckpointError, match="per_layer_config = .* of its config: all layers have one config there"):
        arguments_of("LlamaForCausalLM", LlamaConfig(per_layer_config={1: {"intermediate_size": 40}}))


@fixture
def checkpoint(converted, tmp_path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(converted.checkpoints["hard"], tmp_path / "run" / "step7"))


def test_a_gate_with_a_bias_is_refused(checkpoint, tmp_path):
    path = checkpoint / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    content["module"]["model.layers.1.mlp.banks.0.deepspeed_moe.gate.key.cluster_bias"][2] = 0.5
    torch.save(content, path)
    with raises(CheckpointError, match="step7 is damaged: mp_rank_00_model_states.pt was changed"):
        to_megatron(checkpoint, tmp_path / "out")
    sign(checkpoint)
    with raises(CheckpointError, match="model.layers.1.mlp has a gate with a bias"):
        to_megatron(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_places_that_are_taken_are_refused(checkpoint, converted, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("the only copy")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = digest(tmp_path)
    for convert_to, source in ((to_megatron, checkpoint), (from_megatron, converted.folders["hard"])):
        for name in ("folder", "file", "link"):
            with raises(ConfigError, match=f"{name} exists; remove it"):
                convert_to(source, tmp_path / name)
        with raises(ConfigError, match="which is only read"):
            convert_to(source, source / "out")
        with raises(ConfigError, match="dtype = 'fp64' is not one of"):
            convert_to(source, tmp_path / "out", "fp64")
        with raises(CheckpointError, match="is not a folder"):
            convert_to(tmp_path / "nowhere", tmp_path / "out")
        with raises(CheckpointError, match="could not write"):
            convert_to(source, tmp_path / "file" / "below")
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
            with raises(CheckpointError, match="out needs 1 MB and 0 MB are free"):
                convert_to(source, tmp_path / "out")
    assert digest(tmp_path) == before and not (tmp_path / "out").exists()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with raises(ConfigError, match="belongs to a torch.distributed group already"):
            to_megatron(checkpoint, tmp_path / "out")
    finally:
        distributed.destroy_process_group()
    assert not list(tmp_path.glob("*out*"))


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class _Attribute:
    """Pickles as Python 3.11.2 pickles a member of an enum."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


def test_lists_of_tensors_of_every_python_are_read():
    def read(value):
        return TensorLists(io.BytesIO(pickle.dumps(value))).load()

    kinds = [*WriteItemType, *_MEM_FORMAT_ENCODING]
    assert read([_Attribute(type(kind), kind.name) for kind in kinds]) == kinds
    for owner, name in ((torch.Size, "numel"), (WriteItemType, "__init_subclass__"), (WriteItemType.SHARD, "value")):
        with raises(pickle.UnpicklingError, match="it reads an attribute, which no list of tensors needs"):
            read(_Attribute(owner, name))


def test_folders_that_are_damaged_are_refused(converted, tmp_path):
    folder, proof = tmp_path / "folder", tmp_path / "executed"

    def refused(message: str, signed: bool = True) -> None:
        if not signed:
            (folder / "mocte_manifest.json").unlink()
        with raises(CheckpointError, match=message):
            from_megatron(folder, tmp_path / "out")
        assert not proof.exists() and not list(tmp_path.glob("*out*"))
        shutil.rmtree(folder)
        shutil.copytree(converted.folders["hard"], folder)

    shutil.copytree(converted.folders["hard"], folder)
    for signed, message in ((True, "__0_0.distcp is truncated to"), (False, "folder cannot be read")):
        content = (folder / "__0_0.distcp").read_bytes()
        (folder / "__0_0.distcp").write_bytes(content[: len(content) // 2])
        refused(message, signed)
    (folder / ".metadata").unlink()
    refused(".metadata is missing: .* is not a distributed checkpoint", False)
    (folder / ".metadata").write_bytes(pickle.dumps(_Code(proof)))
    refused("it holds posix.mkdir, which no list of tensors needs", False)
    torch.save({"iteration": _Code(proof)}, folder / "common.pt")
    refused("folder cannot be read.*", False)
    (folder / "mocte_ds" / "model.safetensors").unlink()
    refused("model.safetensors is missing")
    state = json.loads((folder / "mocte_ds" / "state.json").read_text())

    def rewritten(values: dict) -> None:
        (folder / "mocte_ds" / "state.json").write_text(json.dumps(values))
        sign(folder / "mocte_ds")

    rewritten({**state, "format": 2})
    refused("state.json has format 2; this version reads format 1")
    rewritten({**state, "state": {**state["state"], "base": None, "model": {"style": "llama"}}})
    refused("state.json holds a decoder of an earlier version")
    rewritten({**state, "transformer_config": {**state["transformer_config"], "layernorm_epsilon": 0.1}})
    refused("the settings of megatron-core's model are not those of the run's model")
    larger = {**state["state"]["base"], "config": {**state["state"]["base"]["config"], "num_hidden_layers": 10**9}}
    rewritten({**state, "state": {**state["state"], "base": larger}})
    refused("fewer than the parameters of the model that its state.json describes")
    shutil.rmtree(folder / "mocte_ds")
    shutil.copytree(converted.folders["a block in warm-up, all kv heads"] / "mocte_ds", folder / "mocte_ds")
    refused(r"holds decoder.layers.mlp.experts.experts.linear_fc1.weight, for which .* no place \(8 such")
    state["state"]["base"]["config"]["vocab_size"], state["gpt_model"]["vocab_size"] = VOCAB + 1, VOCAB + 1
    rewritten(state)
    refused(f"has {VOCAB} tokens in its vocabulary, the run {VOCAB + 1}")


@mark.parametrize("wrong", ["dense", "some layers, tied", "hard"])
def test_settings_of_another_model_are_refused(converted, tmp_path, wrong):
    """No weight is left out in silence."""
    places = {
        "dense": r"decoder.layers.mlp.experts.experts.linear_fc1.weight, for which.*\(3 such",
        "some layers, tied": r"decoder.layers.mlp.experts.experts.linear_fc1.weight, for which.*\(9 such",
    }
    with raises(CheckpointError, match=places.get(wrong, "decoder.layers.mlp.surplus, for which .* has no place")):
        if wrong == "hard":
            spawn(save_surplus, 1, str(converted.folders["hard"]), str(tmp_path / "more"), timeout=60)
            from_megatron(tmp_path / "more", tmp_path / "back", settings=converted.folders["hard"])
        from_megatron(converted.folders["hard"], tmp_path / "back", settings=converted.folders[wrong])
    assert not (tmp_path / "back").exists()


def test_a_changed_weight_is_not_taken_for_done(checkpoint, tmp_path, monkeypatch):
    read = convert.files.read

    def swapped(model, folder):
        found = read(model, folder)
        names = [f"decoder.layers.1.mlp.experts.local_experts.{k}.linear_fc2.weight" for k in (1, 2)]
        found[names[0]], found[names[1]] = found[names[1]], found[names[0]]
        return found

    monkeypatch.setattr(convert.files, "read", swapped)
    with raises(CheckpointError, match="experts.1.linear_fc2.weight was lost or changed"):
        to_megatron(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path):
    """A limit on the size of files stands for the disk: the weights do not fit into 20 kB."""
    command = [sys.executable, "tools/to_megatron.py", str(checkpoint), str(tmp_path / "out" / "there"), "--json"]
    shell = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and not done.stdout
    assert "error: could not write" in done.stderr and "MB are free there" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not any((tmp_path / "out").iterdir())


def test_no_process_is_left_behind(checkpoint, tmp_path, monkeypatch):
    before = set(psutil.Process().children(recursive=True))

    def look(*_args):
        nonlocal during
        during |= set(psutil.Process().children(recursive=True))
        raise CheckpointError("stopped")

    during: set[psutil.Process] = set()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "compare", look)
        with raises(CheckpointError, match="stopped"):
            to_megatron(checkpoint, tmp_path / "out")
    assert during > before, "megatron-core starts one for its queue"
    assert set(psutil.Process().children(recursive=True)) <= before
    to_megatron(checkpoint, tmp_path / "out")
    from_megatron(tmp_path / "out", tmp_path / "back")
    assert set(psutil.Process().children(recursive=True)) <= before


def test_command_line(checkpoint, tmp_path, capsys):
    assert tool.main([str(checkpoint.parent / "step7"), str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["path"] == str(tmp_path / "out") and facts["experts_compared"] == 12
    assert "reading" in captured.err and "comparing" in captured.err
    assert tool.main([str(tmp_path / "out"), str(tmp_path / "back"), "--back"]) == 0
    assert "63 tensors equal" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "back"), str(tmp_path / "again"), "--dtype", "bf16"]) == 0
    assert "12 experts equal" in capsys.readouterr().out
