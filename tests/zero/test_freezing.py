"""Emergence, freezing and thawing in the partition of ZeRO-1/2 against plain PyTorch, in real processes."""

import pytest

from tests.spawn import spawn
from tests.zero.against import MATRIX, check_bytes, check_optimizer, check_trajectory
from tests.zero.small_run import Case, run_distributed

# fp32 and torch's AdamW: the whole trajectory, forward and backward included.
TRAJECTORIES = [
    Case(1, 1, 1, 500_000_000),
    Case(2, 1, 1, 700, schedule="torch"),
    Case(2, 1, 2, MATRIX - 84, overlap=True, schedule="deepspeed"),
    Case(2, 2, 1, 2000, overlap=True, recompute="plain"),
    Case(2, 2, 2, MATRIX - 84, recompute="reentrant", schedule="torch"),
    Case(2, 2, 2, 500_000_000, overlap=True, offload=True),
    Case(2, 1, 1, 2000, offload=True, schedule="deepspeed"),
    Case(4, 1, 2, 2000, schedule="torch"),
    Case(4, 2, 1, MATRIX - 84, schedule="torch"),
    Case(4, 2, 2, 700, overlap=True, recompute="plain", schedule="deepspeed"),
    Case(4, 4, 1, 2000, overlap=True, schedule="torch"),
    Case(4, 4, 2, MATRIX - 84, offload=True),
]
# Everything else: the optimizer's part of it, from the gradients that the ranks had.
REPLAYS = [
    Case(2, 1, 1, 700, bf16=True),
    Case(2, 2, 2, MATRIX - 84, overlap=True, bf16=True, schedule="torch", sums=True),
    Case(4, 2, 1, 2000, bf16=True, schedule="deepspeed"),
    Case(4, 2, 2, 500_000_000, overlap=True, bf16=True, recompute="reentrant"),
    Case(4, 4, 2, 700, bf16=True, recompute="plain"),
    Case(2, 2, 2, 2000, offload=True, bf16=True, sums=True),
    Case(2, 1, 1, 700, offload=True, bf16=True, overlap=True),
    Case(2, 2, 1, 700, offload=True, bf16=True, optimizer="cpu"),
    Case(2, 1, 2, MATRIX - 84, offload=True, optimizer="cpu", schedule="deepspeed"),
    Case(2, 2, 2, 700, optimizer="fused", bf16=True),
    Case(2, 1, 1, 2000, optimizer="fused", overlap=True, schedule="torch"),
    Case(2, 2, 1, 700, optimizer="torch-fused", overlap=True, schedule="torch"),
]


@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_trajectory_is_that_of_an_optimizer_without_the_frozen_units(case: Case) -> None:
    check_trajectory(case)


@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_optimizer_is_adamw_over_the_trainable_units(case: Case) -> None:
    check_optimizer(case)


def test_bytes_are_those_of_the_trainable_parameters() -> None:
    check_bytes(spawn(run_distributed, 2, Case(2, 2, 2), timeout=200, deepspeed=True))
