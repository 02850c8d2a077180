"""Attention cut over two ranks by DeepSpeed's AutoTP, experts over the same ranks: the run of whole matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mocte_ds.checkpoints.fp32 import convert_zero_checkpoint_to_fp32_state_dict
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.convert.hf.export import export
from mocte_ds.engine import initialize
from mocte_ds.errors import CheckpointError, ConfigError
from tests.engine import tensor_runs as runs
from tests.engine.tensor_variants import VARIANTS, variants
from tests.small_models import small_model
from tests.spawn import spawn

LAST, SAVED = 28, 22


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Two ranks, nothing cut; where it has been exported and saved."""
    folder = tmp_path_factory.mktemp("whole")
    paths = "", str(folder / "saved"), SAVED, str(folder / "export")
    return spawn(runs.train, 2, runs.settings(1, 2), 0, LAST, *paths, timeout=400)[0], folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Four ranks, attention cut over neighbours, experts spread over the same ones."""
    folder = tmp_path_factory.mktemp("cut")
    paths = "", str(folder / "saved"), SAVED, str(folder / "export")
    return spawn(runs.train, 4, runs.settings(2, 2), 0, LAST, *paths, timeout=600), folder


def test_losses_are_those_of_whole_matrices(whole: Any, cut: Any) -> None:
    expected, ranks = whole[0], cut[0]
    for rank, found in enumerate(ranks):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["modes"] == expected["modes"] and found["load"] == expected["load"]
        assert found["batch"] == expected["batch"] == 2 * 2 * 8
        axes = {"data": (rank // 2, 2), "expert": (rank % 2, 2), "expert_data": (rank // 2, 2), "tensor": (rank % 2, 2)}
        assert found["axes"] == {"world": (rank, 4), **axes}


def test_measurements_and_decisions_are_the_same(whole: Any, cut: Any) -> None:
    """Probes that are summed twice, or rows that are read twice, would show in the numbers of the checks."""
    mine, theirs = (
        [e for e in events if e["event"] != "projection"] for events in (cut[0][0]["events"], whole[0]["events"])
    )
    kinds = {event["event"] for event in mine}
    assert kinds == {"check", "emergence", "freeze"}
    compared = 0
    for found, expected in zip(mine, theirs, strict=True):
        names = ("event", "step", "block", "expert", "name", "reason")
        assert [found.get(name) for name in names] == [expected.get(name) for name in names]
        for name in ("lambda", "probe", "blocks"):
            compared += _close(found.get(name), expected.get(name), f"{found['step']} {found['event']} {name}")
    assert compared > 1000


def _close(found: Any, expected: Any, where: str) -> int:
    """How many numbers have been compared."""
    if isinstance(expected, dict):
        return sum(_close(found[key], value, f"{where}.{key}") for key, value in expected.items())
    if isinstance(expected, list):
        return sum(_close(f, e, where) for f, e in zip(found, expected, strict=True))
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), where
        return 1
    assert found == expected, where
    return 1


def test_frozen_experts_give_their_memory_back(whole: Any, cut: Any) -> None:
    expected = [expected - after for expected, after in [whole[0]["held"]]][0]
    freed = [before - after for before, after in (found["held"] for found in cut[0])]
    assert sum(freed) == pytest.approx(expected, abs=64), (
        "one expert's masters and moments, over the ranks that hold it"
    )


def test_a_resumed_run_goes_on_bit_by_bit(cut: Any) -> None:
    before, folder = cut
    rest = spawn(
        runs.train, 4, runs.settings(2, 2), SAVED, LAST, str(folder / "saved"), "", 0, str(folder / "on"), timeout=240
    )
    for old, new in zip(before, rest, strict=True):
        assert new["losses"] == old["losses"][2 * SAVED :] and new["norms"] == old["norms"][SAVED:]
        assert new["modes"] == old["modes"] and new["bytes"] == old["bytes"]
    one, other = (_logits(folder / name) for name in ("export", "on"))
    assert torch.equal(one, other)


def test_the_export_computes_the_same(whole: Any, cut: Any) -> None:
    facts = cut[0][0]["export"]
    assert facts["logit_difference"] < 1e-5 and facts["experts_compared"] == 8
    assert _logits(cut[1] / "export") == pytest.approx(_logits(whole[1] / "export"), rel=1e-4, abs=1e-4)


def _logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40)[None]
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits.detach()


def test_checkpoints_hold_whole_matrices_and_stay_in_their_layout(whole: Any, cut: Any) -> None:
    (files,) = {tuple(found["files"]) for found in cut[0][:1]}
    kept = {name for name in files if "optim" not in name and "random" not in name}
    assert kept == {name for name in whole[0]["files"] if "optim" not in name and "random" not in name}
    optimizer = [f"zero_pp_rank_{data}_mp_rank_{tensor:02d}_optim_states.pt" for data in (0, 1) for tensor in (0, 1)]
    assert [name for name in files if "optim" in name] == optimizer
    told = "this run has 2 ranks with tensor_parallel.autotp_size 1 and ep_size 2"
    assert all(told in text for text in spawn(runs.other_layout, 2, runs.settings(1, 2), str(cut[1] / "saved")))
    told = "this run has 2 ranks with tensor_parallel.autotp_size 2 and ep_size 2"
    assert all(told in text for text in spawn(runs.other_layout, 2, runs.settings(2, 2), str(whole[1] / "saved")))


def test_another_layout_begins_with_the_weights(cut: Any) -> None:
    """What a refused resume advises: the next losses are those of the run that cuts matrices."""
    saved = str(cut[1] / "saved")
    (found,) = spawn(runs.new_run_with_weights, 1, saved, SAVED, timeout=240)
    assert "by 4 ranks with tensor_parallel.autotp_size 2 and ep_size 2, this run has 1 ranks" in found["resumed"]
    assert f"model.init: {saved}" in found["resumed"]
    assert {mode for modes in found["modes"] for mode in modes} == {"training"}
    assert found["losses"] == pytest.approx(cut[0][0]["losses"][2 * SAVED : 2 * SAVED + 2], rel=1e-5)


def test_tools_refuse_what_they_cannot_join_and_export_the_rest(cut: Any, tmp_path: Path) -> None:
    saved = cut[1] / "saved"
    told = r"was saved with tensor_parallel.autotp_size 2: .* Its weights are whole: tools/export_hf.py"
    with pytest.raises(CheckpointError, match=told):
        reshape(saved, tmp_path / "reshaped", 2, 2)
    with pytest.raises(CheckpointError, match=told):
        convert_zero_checkpoint_to_fp32_state_dict(saved, tmp_path / "fp32")
    assert not any(tmp_path.iterdir())
    before = export(saved, tmp_path / "export")
    assert before["experts_compared"] == 8 and before["logit_difference"] < 1e-5


def test_kinds_of_experts_routers_models_and_batches() -> None:
    (expected,) = spawn(variants, 1, 1, timeout=500)
    ranks = spawn(variants, 2, 2, timeout=600)
    for name, variant in VARIANTS.items():
        close = {"rel": 2e-2} if "bf16" in name else {"rel": 2e-5}
        for found in ranks:
            numbers = found[name]["numbers"][: variant.alike]
            assert numbers == pytest.approx(expected[name]["numbers"][: variant.alike], **close), name
            assert found[name]["drawn"] == ranks[0][name]["drawn"], name


def test_what_differs_between_tensor_ranks_is_refused(tmp_path: Path) -> None:
    for found in spawn(runs.faults, 2, str(tmp_path / "saved"), timeout=240):
        for name in ("batch", "length", "arguments"):
            assert found[name].startswith("DataError: the ranks 0, 1 were given different batches"), name
        for name in ("gradient", "dropout"):
            assert "the gradient of trunk differs between the tensor ranks 0, 1" in found[name], name
        assert found["before"] == "no error"
        assert "the weights of model.layers.0.mlp.dense differ between the ranks" in found["weights"]
        assert "would hold one of 2 parts of every matrix of attention" in found["state dict"]
    assert not (tmp_path / "saved" / "apart").exists()


def test_all_ranks_refuse_what_two_of_them_have(cut: Any) -> None:
    ranks = spawn(runs.faults_of_one_group, 4, str(cut[1] / "saved"), timeout=300)
    for found in ranks:
        assert found["batch"].startswith("DataError: the ranks 2, 3 were given different batches")
        assert "the gradient of trunk differs between the tensor ranks 2, 3" in found["gradient"]
        for ep_size in (1, 4):
            told = f"this run has 4 ranks with tensor_parallel.autotp_size 2 and ep_size {ep_size}"
            assert told in found[f"ep_size {ep_size}"]
    assert all(found == ranks[0] for found in ranks)


def _with(changes: dict[str, Any]) -> dict[str, Any]:
    return {**runs.settings(2, 1), **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"zero_optimization": {"stage": 3}}, "autotp_size = 2 is not supported under ZeRO stage 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "autotp_size = 2 is not supported with zero_optimization.offload_optimizer",
        ),
        ({"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}, "tensor_parallel.preset_model = 'llama'"),
        ({"tensor_parallel": {"autotp_size": "2"}}, "autotp_size = '2' must be a number of ranks"),
        ({"tensor_parallel": {"autotp_size": 2.5}}, "autotp_size = 2.5 must be a number of ranks"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        initialize(model=nn.Linear(1, 1), config=_with(changes))


def refusals(tensor: int) -> dict[str, str]:
    """What is said of models that cannot be cut."""
    made = {
        "no plan": small_model("gpt2", 64),
        "key-value heads": runs.model("llama", False, num_key_value_heads=1),
        "a fused matrix": runs.model("phi3", pad_token_id=0),
        "cut": runs.model(),
    }
    made["cut"].ds_autotp_parsed = True  # as DeepSpeed's engine leaves it
    config = runs.settings(tensor, 1, modules="auto")
    return {
        name: runs.refused(lambda model=model: initialize(model=model, config=config)) for name, model in made.items()
    }


def test_models_that_cannot_be_cut() -> None:
    found = spawn(refusals, 2, 2, timeout=240)[0]
    assert "GPT2LMHeadModel has no plan of tensor parallelism" in found["no plan"]
    assert "has 1 key-value heads, which 2 ranks cannot share evenly" in found["key-value heads"]
    assert "Phi3ForCausalLM has a plan of tensor parallelism that AutoTP cannot follow" in found["a fused matrix"]
    assert "LlamaForCausalLM has been cut already" in found["cut"]
    assert "autotp_size = 3 does not divide the 2 ranks" in spawn(refusals, 2, 3, timeout=240)[0]["no plan"]
