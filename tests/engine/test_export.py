"""engine.mocte.export in a user's script: experts of all ranks, the same folder as from the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mocte_ds.convert.hf.register  # noqa: F401
from mocte_ds.checkpoints.load import read_state
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.export import export
from mocte_ds.convert.hf.running import _language_model, _require_as_made, _seen_from
from mocte_ds.convert.hf.trained import tensor_of
from mocte_ds.errors import CheckpointError
from tests.engine import runs
from tests.spawn import spawn


def train_and_export(folder: str) -> dict[str, Any]:
    """Train, export dense and with experts, save; what came out on this rank."""
    import mocte_ds
    from mocte_ds.errors import MocteError

    root = Path(folder)
    settings = runs.config(auto=False, router={"kind": "prefix"}, total_steps=10)
    settings.update(bf16={"enabled": False}, zero_optimization={"stage": 2})
    del settings["scheduler"]
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    rank, drawn = torch.distributed.get_rank(), []

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            for turn in range(2):
                ids, _ = runs.batch(step, 2 * turn + rank)
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()

    steps(0, 2)
    facts = [engine.mocte.export(root / "dense")]
    engine.mocte.emerge(0)
    steps(2, 4)
    before = torch.get_rng_state()
    facts.append(engine.mocte.export(root / "live"))
    drawn.append(torch.equal(before, torch.get_rng_state()))
    engine.save_checkpoint(root / "checkpoints", client_state={"model": "a name of my own"})
    said = []
    for how in ({"folder": root / "mine"}, {"folder": root / "other", "dtype": "int3"}, {"folder": "/proc/x/y"}):
        try:
            engine.mocte.export(**how)
        except MocteError as error:
            said.append(f"{type(error).__name__}: {error}")
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=runs.batch(9, 0)[0]).logits
    engine.train()
    steps(4, 5)
    return {"facts": facts, "logits": logits.numpy(), "said": said, "drawn": drawn}


@torch.no_grad()
def test_two_ranks_export_the_experts_of_both(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    first, second = spawn(train_and_export, 2, str(tmp_path), timeout=180, deepspeed=True)
    assert first["facts"] == second["facts"] and first["said"] == second["said"] and first["drawn"] == [True]
    dense, live = first["facts"]
    assert dense["architecture"] == "LlamaForCausalLM" and dense["experts_compared"] == 0
    assert live["architecture"] == "MocteBlocksForCausalLM" and live["experts_compared"] == 4
    assert max(dense["logit_difference"], live["logit_difference"]) < 1e-5
    ours, dtype, nowhere = first["said"]
    assert ours.startswith("NotOurs") and (tmp_path / "mine" / "thesis.txt").exists()
    assert dtype.startswith("ConfigError: dtype = 'int3'") and "/proc/x/y" in nowhere
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", trust_remote_code=False)).__name__ == (
        "LlamaForCausalLM"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "live", dtype=torch.float32).eval()
    found = model(runs.batch(9, 0)[0], use_cache=False).logits
    for rank in (first, second):
        expected = torch.from_numpy(rank["logits"])
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    # The tool makes the same of the checkpoint, also of one for another number of ranks.
    reshape(tmp_path / "checkpoints", tmp_path / "one", world_size=1, ep_size=1)
    for name in ("checkpoints", "one"):
        assert read_state(tmp_path / name, "global_step4", None, None)["base"]["model_type"] == "llama"
        facts = export(tmp_path / name, tmp_path / f"from {name}")
        assert {**live, "peak_bytes": 0}.items() <= {**facts, "peak_bytes": 0}.items()
        weights = [load_file(tmp_path / n / "model.safetensors") for n in ("live", f"from {name}")]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    sums = json.loads((tmp_path / "live" / "checksums.json").read_text())
    assert set(sums["tensors"]) == set(weights[0]) and "keys_mocte.py" in sums["files"]


class Wrapped(torch.nn.Module):
    """As a LightningModule is: the model as a part, and more beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = runs.model(), torch.nn.Linear(1, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=ids, labels=ids).loss * self.scale.weight.exp().sum()


def train_wrapped(folder: str) -> tuple[dict[str, Any], Any]:
    """Facts of the export of the inner model, and its logits."""
    import mocte_ds

    settings = runs.config(auto=False, router={"kind": "prefix"}, total_steps=10, modules="inner.model.layers.*.mlp")
    settings.update(bf16={"enabled": False}, gradient_accumulation_steps=1)
    del settings["scheduler"]
    engine, *_ = mocte_ds.initialize(model=Wrapped(), config=settings)
    for step in range(4):
        if step == 2:
            engine.mocte.emerge(1)
        engine.backward(engine(runs.batch(step, torch.distributed.get_rank())[0]))
        engine.step()
    facts = engine.mocte.export(Path(folder) / "live")
    inner = engine.module.inner.eval()
    with torch.no_grad():
        return facts, inner(input_ids=runs.batch(9, 0)[0]).logits.numpy()


@torch.no_grad()
def test_a_model_within_another_module_is_exported(tmp_path: Path) -> None:
    (facts, logits), (others, _) = spawn(train_wrapped, 2, str(tmp_path), timeout=180, deepspeed=True)
    assert facts == others and facts["architecture"] == "MocteBlocksForCausalLM" and facts["experts_compared"] == 4
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "live", dtype=torch.float32).eval()
    expected = torch.from_numpy(logits)
    found = model(runs.batch(9, 0)[0], use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_which_model_is_exported() -> None:
    wrapped, plain = Wrapped(), runs.model()
    assert _language_model(wrapped) == ("inner.", wrapped.inner) and _language_model(plain) == ("", plain)
    both = torch.nn.ModuleList([plain, runs.model()])
    assert _language_model(both) == ("", both)
    state = {"config": {"modules": "*"}, "blocks": [{"name": "inner.model.layers.0.mlp"}, {"name": "other.mlp"}]}
    with pytest.raises(CheckpointError, match="block other.mlp lies outside of the model of transformers, inner"):
        _seen_from("inner.", state)


def test_a_part_that_was_replaced_is_named() -> None:
    """The folder is made of the config, and would compute something else without a word."""
    model, made = runs.model(), runs.model()
    _require_as_made(model, made)
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.act_fn is ReLU\(\) in the model that trains, and SiLU"
    ):
        _require_as_made(model, made)
    model.model.layers[1].mlp.act_fn = made.model.layers[1].mlp.act_fn
    model.model.norm.variance_epsilon = 0.5
    with pytest.raises(CheckpointError, match="model.norm is LlamaRMSNorm.*0.5"):
        _require_as_made(model, made)


def test_only_our_own_gates_stay_precise() -> None:
    """A base model may have gates of its own."""

    class Ones(Source):
        def _stored(self, name: str) -> torch.Tensor:
            return torch.ones(2)

    source = Ones(torch.nn.Linear(1, 1), {}, "bf16")
    assert tensor_of(source, "model.layers.1.mlp.gate.weight").dtype == torch.bfloat16
    ours = "model.layers.0.mlp.banks.0.deepspeed_moe.gate.key.cluster_weight"
    assert tensor_of(source, ours).dtype == torch.float32
