"""Figure: the losses of several runs by tokens, FLOPs and wall time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.clocks import TITLES, clock_unit, clocks
from mocte_ds.report.figures.layout import legend, panels
from mocte_ds.report.figures.loss import column
from mocte_ds.report.figures.palette import category_color, category_marker
from mocte_ds.report.run import Run
from mocte_ds.report.wording import listing, plural

_WINDOWS = 40
"""Points of a training loss: each is the mean of as many steps."""
_FIRST_FALL = 0.1
"""Part of a curve that does not decide how high the figure is: it would hide everything after it."""

TITLE = "The losses by three clocks"
READING = (
    "Lower and further left is better. A run that is ahead by one clock may be behind by another: experts can save "
    "tokens and cost computation or time. Curves fall with the learning rate to the end, so that only the ends of runs "
    "with a schedule of their own compare; seconds compare on the same machine only."
)


def uses_validation(runs: Mapping[str, Run]) -> bool:
    """Whether all runs have validations, so that these are drawn, and not the losses of training."""
    return all(len(_validations(run)) > 1 for run in runs.values())


def curve(run: Run, validated: bool) -> tuple[np.ndarray, np.ndarray]:
    """(points,) place among the steps of the log, (points,) loss in nats per token.

    Args:
        run: the logs.
        validated: mean validation loss of the domains; else the loss of training, mean of windows of equal length.
    """
    if validated:
        rows = _validations(run)
        return np.array(rows), np.array([run.metrics[row]["validation"]["mean"] for row in rows], dtype=float)
    losses = column(run, "loss")
    known = np.flatnonzero(np.isfinite(losses))
    parts = [part for part in np.array_split(known, min(_WINDOWS, max(1, len(known)))) if len(part)]
    return np.array([part[-1] for part in parts], dtype=int), np.array([losses[part].mean() for part in parts])


def draw(runs: Mapping[str, Run], narrow: bool) -> Figure | None:
    """One panel a clock, one line a run; None where no run has a loss."""
    validated = uses_validation(runs)
    curves = {name: curve(run, validated) for name, run in runs.items()}
    curves = {name: found for name, found in curves.items() if len(found[0])}
    readings = {name: clocks(runs[name]) for name in curves}
    shown = [clock for clock in TITLES if any(clock in found for found in readings.values())]
    if not curves:
        return None
    sample = f"n = {plural(len(curves), 'run')}; {_drawn(validated)}"
    columns = 1 if narrow else len(shown)
    figure, axes = panels(len(shown), narrow, 2.9, sample, share=False, columns=columns)
    top = max(losses[int(_FIRST_FALL * len(losses))] for _, losses in curves.values())
    low = min(losses.min() for _, losses in curves.values())
    looks: dict[str, dict[str, Any]] = {
        name: {"color": category_color(number), "marker": category_marker(number), "ms": 3.5, "lw": 1.3}
        for number, name in enumerate(runs)
        if name in curves
    }
    for axis, clock in zip(axes, shown, strict=True):
        found = {name: own[clock] for name, own in readings.items() if clock in own}
        factor, unit = clock_unit(clock, max(float(np.nanmax(own)) for own in found.values()))
        for name, own in found.items():
            rows, losses = curves[name]
            axis.plot(own[rows] / factor, losses, **looks[name])
        axis.set_xlabel(unit)
        axis.set_xlim(left=0)
        room = 0.04 * (top - low) or 0.1
        axis.set_ylim(low - room, top + room)
        axis.set_title(TITLES[clock])
    for axis in axes if narrow else axes[:1]:
        axis.set_ylabel("loss (nats per token)")
    legend(figure, narrow, looks, most=5)
    return figure


def caption(runs: Mapping[str, Run]) -> str:
    """What is shown, and which run has no line on which clock."""
    text = f"One line a run: {_drawn(uses_validation(runs))}."
    words = {"flops": "FLOPs", "seconds": "seconds"}
    for clock, word in words.items():
        absent = [name for name, run in runs.items() if clock not in clocks(run)]
        if absent:
            text += f" The log of {listing(absent)} has no {word}."
    silent = [name for name, run in runs.items() if not np.isfinite(column(run, "loss")).any()]
    return text + (f" No step of {listing(silent)} has a finite loss." if silent else "")


def _drawn(validated: bool) -> str:
    if validated:
        return "loss on held-out text, mean of the domains"
    return "loss of training, mean of windows of steps (not all runs have validations in their logs)"


def _validations(run: Run) -> list[int]:
    """Places of the steps that have been validated."""
    return [i for i, row in enumerate(run.metrics) if (row.get("validation") or {}).get("mean") is not None]
