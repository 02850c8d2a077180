"""How much the baseline would have needed for an arm's final loss, from runs of it to several budgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from mocte_ds.study.results import RunResult

CLOCKS = ("tokens", "FLOPs", "seconds")


@dataclass(frozen=True)
class Times:
    """How many times more the baseline needs than an arm; above 1 the arm is faster."""

    value: float
    bound: str = ""
    """`>`: its longest run is not enough. `<`: its shortest one is too long."""

    def __str__(self) -> str:
        return f"{self.bound} {self.value:.2f}".strip()


def times(own: Sequence[RunResult], baseline: Sequence[RunResult], clock: int) -> Times | None:
    """Compare what an arm spent with what the baseline needs for the same final loss.

    Every run of the baseline ends with its own schedule, so none is read off before its learning rate has decayed.
    Between two budgets its loss is taken to fall evenly with the logarithm of the clock.

    Args:
        own: the arm's runs, one for each seed.
        baseline: the baseline's of all budgets and seeds.
        clock: place in :data:`CLOCKS`.

    Returns:
        The ratio of the means over seeds; None without runs, or where a log lacks the clock.
    """
    budgets = sorted({result.budget for result in baseline})
    points = []
    for budget in budgets:
        runs = [result for result in baseline if result.budget == budget]
        points.append((mean(run.clocks[clock] for run in runs), mean(run.loss for run in runs)))
    if not own or not points or not all(spent > 0 for spent, _ in points):
        return None
    spent, loss = mean(run.clocks[clock] for run in own), mean(run.loss for run in own)
    if not spent:
        return None
    if loss > points[0][1]:
        return Times(points[0][0] / spent, "<")
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= loss <= high:
            part = (high - loss) / (high - low) if high > low else 0.0
            return Times(math.exp(math.log(before) + part * (math.log(after) - math.log(before))) / spent)
    longest = max(points, key=lambda point: point[0])
    equal = longest[1] == loss  # the baseline itself, or one that ties with it
    return Times(longest[0] / spent, "" if equal else ">")


def best_rates(results: Sequence[RunResult]) -> dict[str, float]:
    """Learning rate of the best trial of each arm; a loss that is no number is worse than any."""
    found: dict[str, RunResult] = {}
    for result in results:
        best = found.get(result.arm)
        if result.trial and (best is None or result.loss < best.loss):
            found[result.arm] = result
    return {arm: result.rate for arm, result in found.items()}


def at_edge(arm: str, rate: float, results: Sequence[RunResult]) -> bool:
    """Whether a rate is the largest or the smallest of several that were tried: a better one may lie beyond."""
    tried = sorted(result.rate for result in results if result.trial and result.arm == arm)
    return len(tried) > 1 and rate in (tried[0], tried[-1])
