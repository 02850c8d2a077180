"""Figure: the same loss over three clocks: tokens, FLOPs and wall time."""

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import panels
from mocte_ds.report.figures.loss import TRAINING
from mocte_ds.report.figures.palette import category_color
from mocte_ds.report.reader import Run
from mocte_ds.report.wall import wall_clock
from mocte_ds.report.wording import count_unit, duration, flops, integer, plural


def missing(run: Run) -> str | None:
    if len(clocks(run)) < 2:
        return "the log has no cumulative FLOPs and no seconds."
    if not any(row.get("loss") is not None for row in run.metrics):
        return "no step has a finite loss in the log."
    return None


def clocks(run: Run) -> dict[str, np.ndarray]:
    """Name of each clock that the log has, with its reading at every step (NaN where the log has none)."""
    found = {"tokens": np.array([row["tokens"] for row in run.metrics], dtype=float)}
    spent = np.array([np.nan if row.get("flops") is None else row["flops"] for row in run.metrics], dtype=float)
    if np.isfinite(spent).any():
        found["flops"] = spent
    seconds = wall_clock(run)
    if seconds is not None:
        found["seconds"] = seconds
    return found


def draw(run: Run, narrow: bool) -> Figure:
    found = clocks(run)
    figure, axes = panels(len(found), narrow, 2.3, columns=1 if narrow else len(found), share_x=False)
    losses = np.array([np.nan if row.get("loss") is None else row["loss"] for row in run.metrics], dtype=float)
    validated = [i for i, row in enumerate(run.metrics) if (row.get("validation") or {}).get("mean") is not None]
    means = [run.metrics[i]["validation"]["mean"] for i in validated]
    for axis, (name, reading) in zip(axes, found.items(), strict=True):
        factor, unit = _unit(name, np.nanmax(reading))
        axis.plot(reading / factor, losses, color=TRAINING, lw=0.8)
        axis.plot(reading[validated] / factor, means, color=category_color(0), marker="o", ms=4, mec="white", mew=0.5)
        axis.set_xlabel(unit)
        axis.set_xlim(left=0)
        axis.set_title({"tokens": "by tokens", "flops": "by computation", "seconds": "by wall time"}[name])
    for axis in axes if narrow else axes[:1]:
        axis.set_ylabel("loss (nats per token)")
    return figure


def _unit(name: str, largest: float) -> tuple[float, str]:
    if name == "tokens":
        factor, unit = count_unit(largest)
        return factor, f"tokens seen ({unit})" if unit else "tokens seen"
    if name == "flops":
        power = int(np.floor(np.log10(largest))) if largest > 0 else 0
        return 10.0**power, f"training FLOPs (1e{power})"
    return (
        (3600.0, "wall time (hours)")
        if largest > 7200
        else (60.0, "wall time (minutes)")
        if largest > 120
        else (1.0, "wall time (seconds)")
    )


def caption(run: Run) -> str:
    found = clocks(run)
    read = [f"{integer(run.tokens)} tokens"]
    if "flops" in found:
        read.append(f"{flops(float(np.nanmax(found['flops'])))} FLOPs, MO-CTE's own work counted")
    if "seconds" in found:
        read.append(f"{duration(float(np.nanmax(found['seconds'])))} of wall time")
    validations = sum((row.get("validation") or {}).get("mean") is not None for row in run.metrics)
    return (
        f"Grey: training loss of {plural(len(run.metrics), 'step')}, not smoothed; blue: mean validation loss of "
        f"{plural(validations, 'evaluation')}. At the end the clocks read {'; '.join(read)}."
    )


FIGURE = FigureKind(
    name="clocks",
    title="The loss by three clocks",
    reading="A method that saves tokens may still cost computation or time: a claim of speed needs all three against a "
    "dense run of the same machine, which one run alone cannot give.",
    missing=missing,
    draw=draw,
    caption=caption,
)
