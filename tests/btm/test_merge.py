"""BTX: what becomes of every tensor, the parts' own functions, a run from there, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mocte_ds.btm.merge import merge
from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.convert.hf.trained import trained_model
from mocte_ds.data import validation_batches
from mocte_ds.errors import CheckpointError, MocteError, NotOurs
from tests.btm.conftest import CONTEXT
from tests.e2e.conftest import read_log
from tests.scripts import run_script
from tools import btm

PARTS = 3
OPT = {"model_type": "opt", "intermediate_size": None, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}


def forced(model: Any, expert: int) -> Any:
    """Routers that send every token to one expert: a bias that no logit reaches."""
    for module in model.modules():
        if hasattr(module, "cluster_bias"):
            module.cluster_bias.fill_(-1e4)
            module.cluster_bias[expert] = 0.0
    return model


def of_ffns(seed: int) -> Callable[[Any], None]:
    """Other FFNs; what is around them stays."""

    def change(model: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp." in name or ".fc" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    return change


@pytest.mark.parametrize(("top_k", "hf"), [(1, {}), (2, {}), (1, OPT)], ids=["1", "2", "opt"])
def test_a_forced_router_gives_the_part(
    prepared: Path, tmp_path: Path, dense: Callable, top_k: int, hf: dict[str, Any]
) -> None:
    made = [dense(f"part{k}", 0, of_ffns(k), hf=hf) for k in range(PARTS)]
    merge([folder for folder, _ in made], tmp_path / "merged", top_k=top_k)
    ids = validation_batches(prepared, CONTEXT, 4)["first"][0]
    model = trained_model(CheckpointSource(tmp_path / "merged"))
    means = [module.cluster_mean for module in model.modules() if hasattr(module, "cluster_mean")]
    assert len(means) == (2 if top_k == 1 else 0)
    for mean in means:
        assert mean.item() == pytest.approx(1 / PARTS), "what p is on average, with routers as small as at birth"
        mean.fill_(1.0)  # p of the forced expert is 1
    for k, (_, part) in enumerate(made):
        with torch.no_grad():
            found = forced(model, k)(input_ids=ids).logits
            assert torch.allclose(found, part(input_ids=ids).logits, atol=1e-4)
            assert not torch.allclose(found, made[k - 1][1](input_ids=ids).logits, atol=1e-1)


def test_experts_are_the_parts_and_the_rest_is_their_mean(tmp_path: Path, dense: Callable) -> None:
    made = [dense(f"part{k}", k) for k in range(PARTS)]
    facts = merge([folder for folder, _ in made], tmp_path / "merged", seed=4)
    source, seen = CheckpointSource(tmp_path / "merged"), 0
    for name, tensor in made[0][1].state_dict().items():
        states = [part.state_dict()[name] for _, part in made]
        if ".mlp." in name:
            block, _, leaf = name.partition(".mlp.")
            for k, state in enumerate(states):
                path = f"{block}.mlp.banks.0.deepspeed_moe.experts.deepspeed_experts.{k}.{leaf}"
                assert torch.equal(source.read(path), state)
                seen += 1
        else:
            assert torch.allclose(source.read(name), torch.stack(states).mean(0), atol=1e-6)
            assert not torch.equal(source.read(name), tensor) or tensor.dim() == 1
    assert seen == 2 * 3 * PARTS
    routers = [source.read(name) for name in source.shapes if name.endswith("cluster_weight")]
    assert len(routers) == 2 and not torch.equal(*routers)
    assert all(0.01 < router.std() < 0.03 for router in routers)
    assert facts["parameters"] == sum(source.read(name).numel() for name in source.shapes)


def test_a_run_starts_from_it_and_its_routers_learn(
    prepared: Path, tmp_path: Path, dense: Callable, deepspeed_op: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [str(dense(f"part{k}", 0, of_ffns(k))[0]) for k in range(2)]
    btm.main(["merge", *folders, "--out", str(tmp_path / "merged"), "--json"])
    mocte = json.loads(capsys.readouterr().out)["mocte"]
    run = {
        "model": {"init": str(tmp_path / "merged")},
        "data": {"prepared": str(prepared)},
        "training": {"steps": 4, "batch_tokens": 8 * CONTEXT, "micro_batch": 4, "learning_rate": 3e-3},
        "evaluation": {"every": 4, "sequences_per_domain": 2},
        "deepspeed": {
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "mocte": mocte,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    code, output = run_script("launch/pretrain.py", "--run", tmp_path / "run.yaml", "--out", tmp_path / "out")
    assert code == 0, output
    rows = read_log(tmp_path / "out")
    assert all(sum(load) == 2 * 8 * CONTEXT for load in rows[-1]["expert_load"])
    after = CheckpointSource(tmp_path / "out" / "checkpoints")
    learned = [after.read(name) for name in after.shapes if name.endswith("cluster_residual")]
    assert len(learned) == 2 and all(router.abs().max() > 1e-3 for router in learned)


def test_refusals(tmp_path: Path, dense: Callable) -> None:
    one, two = (dense(f"part{k}", k)[0] for k in range(2))
    other = dense("other", 2, hf={"intermediate_size": 32})[0]
    table = dense("table", 3, bigram={"rows": 9})[0]
    with pytest.raises(CheckpointError, match="two checkpoints or more"):
        merge([one], tmp_path / "merged")
    with pytest.raises(CheckpointError, match="models of other configs"):
        merge([one, other], tmp_path / "merged")
    with pytest.raises(CheckpointError, match="not a plain dense model"):
        merge([one, table], tmp_path / "merged")
    merge([one, two], tmp_path / "merged")
    with pytest.raises(CheckpointError, match="not a plain dense model"):
        merge([one, tmp_path / "merged"], tmp_path / "again")
    with pytest.raises(NotOurs):
        merge([one, two], two)
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MocteError, match="is a file"):
        btm.main(["merge", str(one), str(two), "--out", str(tmp_path / "file" / "below")])
