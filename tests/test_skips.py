"""What may be skipped, what is refused, and that a sample without a step is the sample that never had it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocte_ds.controller.expert_rows import ExpertRows
from mocte_ds.dist.mesh import ALONE
from mocte_ds.errors import ConfigError, NonFiniteLoss
from mocte_ds.skips import Skips, described, require_skippable
from mocte_ds.spectrum.sample import Reservoir
from mocte_ds.training.watch_section import WatchSection


def engine(overflow: bool) -> Any:
    optimizer = SimpleNamespace(overflow=overflow)
    return SimpleNamespace(optimizer=optimizer, global_steps=8, global_samples=32, train_batch_size=lambda: 4)


def test_the_engine_stands_before_the_step_again() -> None:
    told: list[dict] = []
    skips = Skips(1, ALONE, told.append, lambda: {"sequences": [4, 7]})
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert skips.begin_pass(torch.tensor([0, -1, 0]), ["books", "code"]) and not skips.begin_pass(None, [])
    with skips.drawing():
        torch.rand(5)
    skips.see(torch.tensor(1.0))
    skips.see(torch.tensor(torch.inf))
    stands = engine(overflow=True)
    assert skips.look(stands) and (stands.global_steps, stands.global_samples) == (7, 28)
    assert torch.equal(torch.rand(2), expected)
    assert described(told[0]) == "the loss on rank 0 (books; sequences 4 to 7)" and told[0]["step"] == 8

    with pytest.raises(NonFiniteLoss, match="step 8: the gradient norm .sequences 4 to 7. is not finite, after 1 in a"):
        skips.look(engine(overflow=True))
    assert not skips.look(engine(overflow=False)) and skips.streak == [] and len(told) == 1


def test_a_loss_is_finite_in_its_own_precision() -> None:
    skips = Skips(1, ALONE, pytest.fail)
    skips.see(torch.tensor(1e300, dtype=torch.float64))
    assert float(skips.spoiled) == 0.0 and torch.as_tensor(skips.spoiled).dtype == torch.float32
    skips.see(torch.tensor(torch.nan, dtype=torch.float64))
    assert math.isnan(float(skips.spoiled))


def test_a_load_forgets_the_step_that_was_going_on() -> None:
    told: list[dict] = []
    skips = Skips(2, ALONE, told.append)
    skips.begin_pass(torch.tensor([0]), ["books"])
    skips.see(torch.tensor(torch.nan))
    skips.restore([{"step": 8}])
    assert skips.begin_pass(torch.tensor([0]), ["code"]) and skips.spoiled == 0.0
    assert skips.look(engine(overflow=True))
    assert (told[0]["what"], told[0]["domains"], told[0]["in_a_row"]) == ("gradient norm", ["code"], 2)


def test_off_it_looks_at_nothing() -> None:
    skips = Skips(0, ALONE, pytest.fail)
    assert not skips.begin_pass(None, [])
    skips.see(torch.tensor(torch.nan))
    assert skips.spoiled == 0.0 and not skips.look(engine(overflow=True))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "fp16.enabled"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}, "zero_optimization": {"stage": 1}},
            "torch_autocast",
        ),
        ({"bf16": {"enabled": True}}, "zero_optimization.stage = 0"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "zero_optimization.compute_grad_norm"),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 2}},
            "bf16.check_grad",
        ),
    ],
)
def test_where_it_would_not_work_it_is_refused(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^watch.skip_nonfinite = 2 does not go with {named}"):
        require_skippable(settings, "watch.skip_nonfinite", 2)
    require_skippable(settings, "watch.skip_nonfinite", 0)
    require_skippable({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, "watch.skip_nonfinite", 2)


def test_one_return_must_have_room() -> None:
    with pytest.raises(ConfigError, match="leave_out = 2 is too small for skip_nonfinite = 2: .* leaves 3 batches out"):
        WatchSection(skip_nonfinite=2, leave_out=2)
    WatchSection(skip_nonfinite=2, leave_out=3)
    WatchSection(skip_nonfinite=2)


def offers(reservoir: Reservoir, first: int, count: int) -> None:
    keys = torch.arange(first, first + count)
    reservoir.add(keys[:, None].float(), keys)


@pytest.mark.parametrize("cleared", ["never", "before the step", "within the step"])
def test_a_sample_without_a_step(cleared: str) -> None:
    """Grown, full and emptied in between: rows, keys and slots are those of a sample that has not seen the step."""
    with_step, without = Reservoir(40, 1, seed=5), Reservoir(40, 1, seed=5)
    for first in range(0, 150, 30):
        if cleared == "before the step" and first == 60:
            with_step.clear()
            without.clear()
        with_step.selection.mark()
        with_step.mark()
        offers(with_step, 1000 + first, 17)
        if cleared == "within the step":
            with_step.clear()
        offers(with_step, 2000 + first, 17)
        with_step.take_back()
        with_step.selection.take_back()
        for reservoir in (with_step, without):
            offers(reservoir, first, 30)
        assert torch.equal(with_step.rows(), without.rows()) and torch.equal(with_step.keys(), without.keys())
        assert torch.equal(with_step.selection.slots, without.selection.slots)


@pytest.mark.parametrize("cleared", [False, True])
def test_rows_of_experts_without_a_step(cleared: bool) -> None:
    with_step, without = ExpertRows(2, 6, seed=1), ExpertRows(2, 6, seed=1)

    def offer(rows: ExpertRows, first: int) -> None:
        sequence = torch.arange(first, first + 8)
        rows.offer(sequence[:, None].float(), (sequence % 2)[:, None], sequence, torch.zeros(8, dtype=torch.int64))

    for first in range(0, 40, 8):
        with_step.mark()
        offer(with_step, 1000 + first)
        if cleared:
            with_step.clear()
        offer(with_step, 2000 + first)
        with_step.take_back()
        offer(with_step, first)
        offer(without, first)
        one, other = with_step.state_dict(), without.state_dict()
        for mine, yours in zip(one["rows"], other["rows"], strict=True):
            assert torch.equal(mine, yours)
        for mine, yours in zip(one["chosen"], other["chosen"], strict=True):
            assert all(torch.equal(mine[name], yours[name]) for name in mine)
