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


def test_means_over_seeds() -> None:
    more = [replace(run, seed=1, loss=run.loss + 0.2) for run in BASE]  # 2.3, 2.1, 2.0 on average
    arm = [replace(PLAIN, arm="moe", seed=seed, tokens=1000, loss=loss) for seed, loss in ((0, 2.0), (1, 2.4))]
    # 2.2 lies half way between the budgets 0.5 and 1.
    assert times(arm, [*BASE, *more], 0).value == pytest.approx(0.5**0.5)


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
    assert not at_edge("a", 2.0, trials) and at_edge("b", 1.0, trials) and at_edge("a", 4.0, trials)
    assert not at_edge("c", 1.0, [replace(PLAIN, arm="c", trial=True, rate=1.0)]), "a single trial has no range"
