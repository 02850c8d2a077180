"""Figure: the same loss over three clocks: tokens, FLOPs and wall time."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import legend, panels
from mocte_ds.report.figures.loss import TRAINING, column, sample, validation_series
from mocte_ds.report.figures.palette import category_color
from mocte_ds.report.ledger import wall_clock
from mocte_ds.report.run import Run
from mocte_ds.report.wording import count_unit, duration, flops, integer, listing

TITLES = {"tokens": "by tokens", "flops": "by computation", "seconds": "by wall time"}
MEAN: dict[str, Any] = {"color": category_color(0), "marker": "o", "ms": 4, "mec": "white", "mew": 0.5}


def missing(run: Run) -> str | None:
    if len(clocks(run)) < 2:
        return "the log has no cumulative FLOPs and no seconds."
    if not np.isfinite(column(run, "loss")).any():
        return "no step has a finite loss in the log."
    return None


def clocks(run: Run) -> dict[str, np.ndarray]:
    """Name of each clock that the log has, with its reading at every step (NaN where the log has none)."""
    found = {"tokens": column(run, "tokens")}
    spent = column(run, "flops")
    if np.isfinite(spent).any():
        found["flops"] = spent
    seconds = wall_clock(run)
    if seconds is not None:
        found["seconds"] = seconds
    return found


def draw(run: Run, narrow: bool) -> Figure:
    found = clocks(run)
    columns = 1 if narrow else len(found)
    figure, axes = panels(len(found), narrow, 2.3, sample(run, ["mean"]), share=False, columns=columns)
    means = validation_series(run, "mean")[1]
    rows = [i for i, row in enumerate(run.metrics) if (row.get("validation") or {}).get("mean") is not None]
    for axis, (name, reading) in zip(axes, found.items(), strict=True):
        factor, unit = clock_unit(name, float(np.nanmax(reading)))
        axis.plot(reading / factor, column(run, "loss"), color=TRAINING, lw=0.8)
        axis.plot(reading[rows] / factor, means, **MEAN)
        axis.set_xlabel(unit)
        axis.set_xlim(left=0)
        axis.set_title(TITLES[name])
    for axis in axes if narrow else axes[:1]:
        axis.set_ylabel("loss (nats per token)")
    looks = {"training": {"color": TRAINING}} | ({"validation, mean of the domains": MEAN} if means else {})
    legend(figure, narrow, looks)
    return figure


def clock_unit(name: str, largest: float) -> tuple[float, str]:
    """(what one unit of the axis is worth, name of the axis)."""
    if name == "tokens":
        factor, unit = count_unit(largest)
        return factor, f"tokens seen ({unit})" if unit else "tokens seen"
    if name == "flops":
        power = int(np.floor(np.log10(largest))) if largest > 0 else 0
        return 10.0**power, f"training FLOPs (1e{power})"
    for seconds, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if largest > 2 * seconds:
            return seconds, f"wall time ({unit})"
    return 1.0, "wall time (seconds)"


def caption(run: Run) -> str:
    found = clocks(run)
    read = [f"{integer(run.tokens)} tokens"]
    if "flops" in found:
        read.append(f"{flops(float(np.nanmax(found['flops'])))} FLOPs (MO-CTE's own work included)")
    if "seconds" in found:
        read.append(f"{duration(float(np.nanmax(found['seconds'])))} of wall time (checks and validations included)")
    return f"The loss of the figure above, over three measures of effort. At the end the clocks read {listing(read)}."


FIGURE = FigureKind(
    name="clocks",
    title="The loss by three clocks",
    reading="A method that saves tokens may still cost computation or time: a claim of speed needs all three against a "
    "dense run on the same machine, which one run alone cannot give.",
    missing=missing,
    draw=draw,
    caption=caption,
)
