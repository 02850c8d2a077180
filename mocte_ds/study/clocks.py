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
        The ratio of the means over the seeds that all of them have; None without any, or where a log lacks the clock.
    """
    seeds = {result.seed for result in own if not result.diverged}
    budgets: dict[float, dict[int, RunResult]] = {}
    for result in baseline:
        if result.seed in seeds and not result.diverged:
            budgets.setdefault(result.budget, {})[result.seed] = result
    if not budgets:
        return None
    # The same seeds on all sides: a hard one must not count on one side alone.
    common = seeds.intersection(*budgets.values())
    if not common:
        return None
    runs = [[by_seed[seed] for seed in common] for by_seed in budgets.values()]
    points = sorted((mean(r.clocks[clock] for r in found), mean(r.loss for r in found)) for found in runs)
    mine = [result for result in own if result.seed in common]
    spent, loss = mean(result.clocks[clock] for result in mine), mean(result.loss for result in mine)
    if not spent or not points[0][0]:
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
    """Learning rate of the best trial of each arm; none for an arm of which all have diverged."""
    found: dict[str, RunResult] = {}
    for result in results:
        if result.trial and not result.diverged:
            best = found.setdefault(result.arm, result)
            found[result.arm] = min(best, result, key=lambda one: one.loss)
    return {arm: result.rate for arm, result in found.items()}


def at_edge(arm: str, rate: float, results: Sequence[RunResult]) -> bool:
    """Whether a rate is the largest or the smallest of several that were tried: a better one may lie beyond."""
    tried = sorted(result.rate for result in results if result.trial and result.arm == arm)
    return len(tried) > 1 and rate in (tried[0], tried[-1])
