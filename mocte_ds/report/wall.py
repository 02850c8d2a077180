"""Wall time of a run, from what its log says of every step."""

import numpy as np

from mocte_ds.report.reader import Run


def wall_clock(run: Run) -> np.ndarray | None:
    """Seconds of training up to every step, (steps,), or None if the log has no times.

    The log's ``seconds`` may count one step or all steps so far; tokens per second tell which. A run that was resumed
    may start its clock again: then the clock goes on from where it stood.
    """
    seconds = np.array([_number(row.get("seconds")) for row in run.metrics])
    if not np.isfinite(seconds).any():
        return None
    seconds = np.nan_to_num(seconds)
    steps = np.diff(seconds)
    speed = np.array([_number(row.get("tokens_per_second")) for row in run.metrics])
    tokens = np.diff([0] + [row["tokens"] for row in run.metrics])
    known = np.isfinite(speed) & (speed > 0)
    one_step = np.median(tokens[known] / speed[known]) if known.any() else None
    if len(seconds) == 1 or (one_step is not None and np.median(seconds) < 1.5 * one_step):
        return np.cumsum(seconds)
    if one_step is None and (steps < 0).mean() > 0.1:
        return np.cumsum(seconds)
    restarts = np.where(steps < 0, -steps, 0.0)
    return seconds + np.concatenate([[0.0], np.cumsum(restarts)])


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
