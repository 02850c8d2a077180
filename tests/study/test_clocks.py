"""Best of equal trials, and what the baseline needs for an arm's loss, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from mocte_ds.study.clocks import at_edge, best_rates, times
from tests.study.test_results import PLAIN

# The baseline to three budgets; with each doubling its loss falls by 0.2 and by 0.1.
BASE = [
    replace(PLAIN, budget=0.5, tokens=500, flops=50.0, seconds=5.0, loss=2.2),
    replace(PLAIN, budget=1.0, tokens=1000, flops=100.0, seconds=12.0, loss=2.0),
    replace(PLAIN, budget=2.0, tokens=2000, flops=200.0, seconds=24.0, loss=1.9),
]


@pytest.mark.parametrize(
    ("loss", "tokens", "flops", "seconds"),
    [
        (2.0, "1.00", "0.80", "1.00"),
        (1.95, "1.41", "1.13", "1.41"),  # half way between 1 and 2 on a logarithmic scale: the square root of 2
        (2.1, "0.71", "0.57", "0.65"),  # sqrt(5 * 12) / 12 seconds
        (1.9, "2.00", "1.60", "2.00"),
        (1.5, "> 2.00", "> 1.60", "> 2.00"),
        (2.5, "< 0.50", "< 0.40", "< 0.42"),
    ],
)
def test_what_the_baseline_needs_for_an_arms_loss(loss: float, tokens: str, flops: str, seconds: str) -> None:
    arm = [replace(PLAIN, arm="moe", tokens=1000, flops=125.0, seconds=12.0, loss=loss)]
    assert [str(times(arm, BASE, clock)) for clock in range(3)] == [tokens, flops, seconds]


def test_means_over_the_seeds_that_all_have() -> None:
    more = [replace(run, seed=1, loss=run.loss + 0.2) for run in BASE]  # 2.3, 2.1, 2.0 on average
    arm = [replace(PLAIN, arm="moe", seed=seed, tokens=1000, loss=loss) for seed, loss in ((0, 2.0), (1, 2.4))]
    # 2.2 lies half way between the budgets 0.5 and 1.
    found = times(arm, [*BASE, *more], 0)
    assert found is not None and found.value == pytest.approx(0.5**0.5)
    # A hard seed of the baseline, or of the arm, alone says nothing; nor does a budget that has only such.
    hard = replace(BASE[1], seed=2, loss=9.0)
    alone = replace(PLAIN, arm="moe", seed=3, loss=0.1)
    assert times([*arm, alone], [*BASE, *more, hard, replace(hard, budget=3.0)], 0) == found
    # With one budget of seed 0 alone everything is compared by seed 0: 2.0 is the baseline's own loss there.
    assert str(times(arm, [*BASE, *more[:2]], 0)) == "1.00"
    assert times([alone], BASE, 0) is None and times([replace(arm[0], loss=float("inf"))], BASE, 0) is None


def test_nothing_to_compare_with() -> None:
    assert times([], BASE, 0) is None and times(BASE[:1], [], 0) is None
    assert times([replace(PLAIN, seconds=0.0)], BASE, 2) is None, "a log without times"


def test_best_of_equal_trials() -> None:
    trials = [
        replace(PLAIN, arm=arm, trial=True, rate=rate, loss=loss)
        for arm, rate, loss in (
            ("a", 1.0, 3.0),
            ("a", 2.0, 2.0),
            ("a", 4.0, float("inf")),
            ("b", 1.0, 5.0),
            ("b", 2.0, 6.0),
        )
    ]
    compared = replace(PLAIN, arm="a", rate=4.0, loss=0.0)
    assert best_rates([*trials, compared]) == {"a": 2.0, "b": 1.0}, "what is compared chooses nothing"
    assert best_rates([trials[2], trials[1]]) == {"a": 2.0} and best_rates([trials[2]]) == {}, "diverged ones come last"
    assert not at_edge("a", 2.0, trials) and at_edge("b", 1.0, trials) and at_edge("a", 4.0, trials)
    assert not at_edge("c", 1.0, [replace(PLAIN, arm="c", trial=True, rate=1.0)]), "a single trial has no range"
