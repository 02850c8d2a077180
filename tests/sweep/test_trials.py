"""Best of equal trials, and clocks to the baseline's final loss, against numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from mocte_ds.sweep import Arm, Sweep, markdown_table, trials_table
from mocte_ds.sweep.trials import best_trials, reached
from tests.sweep.test_results import PLAIN, cells

# Tokens, FLOPs, seconds and the loss.
CURVE = ((100.0, 10.0, 1.0, 4.0), (200.0, 20.0, 2.0, 3.0), (400.0, 40.0, 8.0, 2.0))
FAST = ((100.0, 12.0, 2.0, 3.0), (200.0, 24.0, 4.0, 1.0), (400.0, 48.0, 8.0, 0.5))
ARMS = [Arm(f"{name},lr={rate}", {}, name) for name in ("dense", "moe", "late") for rate in (1, 2)]
RESULTS = [
    replace(PLAIN, arm="dense,lr=1", loss=2.0, curve=CURVE),
    replace(PLAIN, arm="dense,lr=2", loss=2.5, curve=CURVE),
    replace(PLAIN, arm="moe,lr=1", loss=0.9, curve=FAST),
    replace(PLAIN, arm="moe,lr=2", loss=0.5, curve=FAST),
    replace(PLAIN, arm="late,lr=1", loss=2.1, curve=((100.0, 10.0, 1.0, 2.1),)),
]


def sweep() -> Sweep:
    return Sweep(Path("run.yaml"), 1, [0], "dense", ARMS)


def test_the_best_trial_of_each_arm_beside_the_best_of_the_baseline() -> None:
    head, dense, moe, late = cells(trials_table(sweep(), RESULTS))
    assert head == "arm|best trial|trials|seeds|loss|vs dense|x tokens|x FLOPs|x seconds".split("|")
    assert dense == "dense|dense,lr=1|2 of 2|1|2.0000|+0.0000|1.00|1.00|1.00".split("|")
    # It is at 2.0 half way between 100 and 200 tokens, 12 and 24 FLOPs, 2 and 4 seconds.
    assert moe == "moe|moe,lr=2|2 of 2|1|0.5000|-1.5000|2.67|2.22|2.67".split("|")
    assert late == "late|late,lr=1|1 of 2|1|2.1000|+0.1000|-|-|-".split("|")
    assert trials_table(sweep(), []) == ""


def test_the_large_table_compares_with_the_best_trial_too() -> None:
    rows = {row[0]: row for row in cells(markdown_table(sweep(), RESULTS))}
    assert rows["dense,lr=2"][3] == "+0.5000" and rows["moe,lr=1"][3] == "-1.1000"


def test_trials_with_fewer_seeds_do_not_compete() -> None:
    seeds = [replace(PLAIN, arm="dense,lr=1", seed=seed, loss=2.0) for seed in (0, 1)]
    assert best_trials(sweep(), [*seeds, replace(PLAIN, arm="dense,lr=2", loss=1.0)]) == {"dense": "dense,lr=1"}


def test_trials_are_compared_by_the_seeds_that_all_have() -> None:
    """Of lr=1 seed 1 is a hard one; on seed 0, which both have, it is the better."""
    first = [replace(PLAIN, arm="dense,lr=1", seed=seed, loss=loss) for seed, loss in ((0, 1.0), (1, 9.0))]
    second = [replace(PLAIN, arm="dense,lr=2", seed=seed, loss=loss) for seed, loss in ((0, 2.0), (2, 1.0))]
    assert best_trials(sweep(), [*first, *second]) == {"dense": "dense,lr=1"}


def test_a_clock_is_read_between_two_validations() -> None:
    result = replace(PLAIN, curve=CURVE)
    assert reached(result, 2.5, 0) == pytest.approx(300.0) and reached(result, 2.5, 2) == pytest.approx(5.0)
    assert reached(result, 4.5, 0) == 100.0, "there at the first validation"
    assert reached(result, 1.9, 0) is None
