"""tools/benchmark.py step: engines that train the same model, whose steps are timed in turns."""

import json

import pytest
import torch

from mocte_ds.benchmark.measure.step_arms import AUX, StepSizes, make_arms
from mocte_ds.benchmark.step import _DEFAULTS, WORDS, _bytes
from tests.spawn import spawn
from tools.benchmark import main

SIZES = StepSizes("quickstart", context=16, micro_batch=2, experts=4, ep=1, ranks=1, stage=2, dtype="fp32")


def losses_at_birth() -> dict[str, float]:
    """Cross-entropy of each arm on the same tokens, before it has learned; experts begin as copies of the FFN."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    ids = torch.randint(2048, (2, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, arm in make_arms(SIZES).items():
        if name in {"hash", "banks", "lora"}:
            for handle in arm.engine.mocte.blocks:
                arm.engine.mocte.emerge(block=handle.index)
        loss = arm.loss(ids)
        found[name] = float(loss - arm.added())
        if name == "deepspeed":
            # Four experts, loads near even: the published loss is near 1 for each of four layers.
            found["added"] = float(arm.added())
    return found


def test_the_arms_train_the_same_model() -> None:
    (found,) = spawn(losses_at_birth, 1, timeout=120, deepspeed=True)
    assert 2 * AUX < found.pop("added") < 8 * AUX
    switch = found.pop("deepspeed")  # its weight p is not 1
    assert found.keys() == WORDS.keys() - {"deepspeed"}
    assert max(abs(loss - found["dense"]) for loss in found.values()) < 1e-5, found
    assert 1e-4 < abs(switch - found["dense"]) < 1.0


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--context 16 --micro-batch 2 --dtype fp32 --repeats 2 --ranks 2 --ep 2 --device cpu --json"
    assert main(["step", *options.split()]) == 0
    numbers = json.loads(capsys.readouterr().out)
    arms = numbers["arms"]
    assert arms.keys() == WORDS.keys() and arms["dense"]["over_dense"] == 1.0
    for arm in arms.values():
        assert arm["tokens_per_second"] == pytest.approx(64 / arm["seconds"])
        assert sum(arm["phases"].values()) == pytest.approx(arm["seconds"], rel=0.5)
    counted = {name for name, arm in arms.items() if arm["load"] is not None}
    assert counted == {"hash", "token", "banks", "lora"}
    assert all(1.0 <= arms[name]["load"] <= 4.0 for name in counted)


def test_the_default_sizes_fit_on_a_gpu_of_80_gb() -> None:
    needed = _bytes(StepSizes(**_DEFAULTS["cuda"], stage=2, dtype="bf16"), "cuda")
    # Five engines with eight experts for each FFN of gpt-140m, 16 bytes a parameter, are 42 GB beside seven dense ones.
    assert 42e9 + 7 * 16 * 138e6 < needed < 75e9


def test_more_context_than_positions_is_refused() -> None:
    with pytest.raises(Exception, match="--context 512: quickstart has 256 positions"):
        main(["step", "--context", "512", "--device", "cpu"])
