"""The best of equal trials of each arm, and how much of the baseline's tokens, FLOPs and seconds it needed."""

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from mocte_ds.sweep.results import RunResult

if TYPE_CHECKING:
    from mocte_ds.sweep.plan import Sweep

CLOCKS = ("tokens", "FLOPs", "seconds")
LEGEND = """\
- **trials**: learning rates that are done, of all; an arm's row is its trial with the lowest mean loss
- **x tokens, x FLOPs, x seconds**: what the baseline's best trial had spent at its end over what the arm had spent when
  its own validation first was at that trial's final loss, mean over seeds; between two validations the loss is taken to
  fall evenly. A dash: some seed never came there. Arms are read off before their learning rate has decayed, which is
  unfair to them"""


def best_trials(sweep: "Sweep", results: Sequence[RunResult]) -> dict[str, str]:
    """For each arm of the file that has results, the name of its best trial: the lowest mean loss over its seeds.

    Only trials with as many seeds as the one that has most are compared, and those by the seeds that all of them have.
    """
    found = {}
    for family in dict.fromkeys(arm.of for arm in sweep.arms):
        names = [arm.name for arm in sweep.arms if arm.of == family]
        losses = {name: {r.seed: r.loss for r in results if r.arm == name} for name in names}
        most = max(len(values) for values in losses.values())
        if most:
            tried = [name for name in names if len(losses[name]) == most]
            common = set.intersection(*(set(losses[name]) for name in tried)) or set(losses[tried[0]])
            tried = [name for name in tried if common <= set(losses[name])]
            found[family] = min(tried, key=lambda name: mean(losses[name][seed] for seed in common))
    return found


def times_less(own: Sequence[RunResult], base: dict[int, RunResult], clock: int) -> float | None:
    """How many times less of a clock an arm had spent at the baseline's final loss, mean over the common seeds.

    Args:
        own: the arm's results.
        base: the baseline's by seed.
        clock: place in :data:`CLOCKS`.

    Returns:
        Above 1 where the arm is faster; None where some seed did not reach that loss or its log lacks the clock.
    """
    ratios = []
    for result in own:
        other = base.get(result.seed)
        if other is None or not other.curve:
            continue
        reading = reached(result, other.loss, clock)
        if not reading:
            return None
        ratios.append(other.curve[-1][clock] / reading)
    return mean(ratios) if ratios else None


def reached(result: RunResult, loss: float, clock: int) -> float | None:
    """What a clock showed when the validation loss first was at a value or below; None: never."""
    before: tuple[float, ...] | None = None
    for point in result.curve:
        if point[3] <= loss:
            if before is None or before[3] == point[3]:
                return point[clock]
            part = (before[3] - loss) / (before[3] - point[3])
            return before[clock] + part * (point[clock] - before[clock])
        before = point
    return None


def trials_table(sweep: "Sweep", results: Sequence[RunResult]) -> str:
    """One row for each arm of the file with its best trial; an empty text where nothing is done."""
    best = best_trials(sweep, results)
    by_arm = {name: [r for r in results if r.arm == name] for name in best.values()}
    base = {r.seed: r for r in by_arm.get(best.get(sweep.baseline or "", ""), [])}
    rows = [["arm", "best trial", "trials", "seeds", "loss", f"vs {sweep.baseline}", *(f"x {c}" for c in CLOCKS)]]
    for family, name in best.items():
        own, names = by_arm[name], [arm.name for arm in sweep.arms if arm.of == family]
        done = sum(any(r.arm == trial for r in results) for trial in names)
        gaps = [r.loss - base[r.seed].loss for r in own if r.seed in base]
        times = [times_less(own, base, clock) for clock in range(len(CLOCKS))]
        rows.append(
            [family, name, f"{done} of {len(names)}", str(len(own)), f"{mean(r.loss for r in own):.4f}"]
            + [f"{mean(gaps):+.4f}" if gaps else "-", *("-" if t is None else f"{t:.2f}" for t in times)]
        )
    if len(rows) == 1:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
