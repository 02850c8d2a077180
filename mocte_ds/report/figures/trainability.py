"""Figure: trainability of every expert over time, with freezes and thaws."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.facts import MOCTE, fact
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.labels import LINE_POINTS, label_ends
from mocte_ds.report.figures.layout import legend, log_axis, outer_labels, panels, token_axis
from mocte_ds.report.figures.marks import KINDS, emergence_lines, expert_events, legend_of_events
from mocte_ds.report.figures.palette import INK, category_color
from mocte_ds.report.run import Row, Run
from mocte_ds.report.wording import percent, plural, significant, spread

SMOOTHING = 3
"""Checks that the strong line averages: as many as the freeze policies do."""


def missing(run: Run) -> str | None:
    if not measured_blocks(run):
        return "no expert has been measured: experts have not emerged yet, or the freeze policy is off."
    return None


def series(run: Run, block: int, expert: int) -> tuple[list[int], list[float]]:
    """(tokens, lambda) of an expert at the checks that measured it.

    A check that does not measure an expert, for want of tokens or because it is frozen for good, repeats the old one.
    """
    tokens: list[int] = []
    values: list[float] = []
    for at, entry in run.block_history(block):
        for row in entry.get("experts") or []:
            value = row.get("lambda")
            if row.get("expert") == expert and value is not None and value not in values[-1:]:
                tokens.append(at)
                values.append(value)
    return tokens, values


def smoothed(values: list[float], width: int = SMOOTHING) -> np.ndarray:
    """(n,) mean of each value and those before it, ``width`` in all, as far as they exist."""
    return np.array([np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))])


def measured(run: Run, block: int) -> dict[int, tuple[list[int], list[float]]]:
    """Series of every expert of a block that was measured at least once."""
    found = {expert: series(run, block, expert) for expert in range(run.experts[block])}
    return {expert: both for expert, both in found.items() if both[0]}


def measured_blocks(run: Run) -> list[int]:
    """Blocks of which at least one expert has a measured trainability."""
    return [block for block in run.blocks if measured(run, block)]


def draw(run: Run, narrow: bool) -> Figure:
    blocks = measured_blocks(run)
    most = max(run.experts[block] for block in blocks)
    sizes = [len(values) for block in blocks for _, values in measured(run, block).values()]
    height = max(2.2, 1.0 + most * LINE_POINTS / 72)
    sample = f"n = {spread(sizes)} measurements per expert"
    rows = fact(run, *MOCTE, "freeze", "rows")
    sample += f", each on at most {rows} of its tokens per rank" if rows else ""
    figure, axes = panels(len(blocks), narrow, height, sample)
    ends = []
    for axis, block in zip(axes, blocks, strict=True):
        labels = []
        for expert, (x, y) in measured(run, block).items():
            color = category_color(expert)
            axis.plot(x, y, color=color, lw=0.7, alpha=0.35, marker="o" if len(x) == 1 else None, ms=3)
            axis.plot(x, smoothed(y), color=color, lw=1.5)
            labels.append((smoothed(y)[-1], _name(run, block, expert), color))
        for event in expert_events(run, block):
            at = _value_at(run, event)
            if at is not None:
                color = category_color(event["expert"])
                axis.plot(event["tokens"], at, KINDS[event["event"]], color=color, ms=8, mec="black", mew=1, zorder=4)
        emergence_lines(axis, run, block)
        axis.set_title(run.blocks[block])
        name = token_axis(axis, run.tokens)
        ends.append((axis, labels))
    values = np.array([v for block in blocks for _, y in measured(run, block).values() for v in y], dtype=float)
    logarithmic = bool((values > 0).all() and values.max() / values.min() > 8)
    if logarithmic:
        log_axis(axes[0], values.min(), values.max())
    elif values.min() >= 0:
        axes[0].set_ylim(0, values.max() * 1.08)
    outer_labels(axes, name, "trainability λ\n(per token" + (", log)" if logarithmic else ")"))
    looks: dict[str, dict[str, Any]] = {
        "each check": {"color": INK, "lw": 0.7, "alpha": 0.35},
        f"mean of {SMOOTHING} checks": {"color": INK},
    }
    legend(figure, narrow, looks | legend_of_events(run, "emergence", "freeze", "thaw"))
    label_ends(ends)
    return figure


def _name(run: Run, block: int, expert: int) -> str:
    mine = [event for event in expert_events(run, block) if event["expert"] == expert]
    return f"e{expert}" + (" frozen" if mine and mine[-1]["event"] == "freeze" else "")


def _value_at(run: Run, event: Row) -> float | None:
    """Lambda of an expert at an event: the event's own, or that of the last check before it."""
    if event.get("lambda") is not None:
        return event["lambda"]
    x, y = series(run, event["block"], event["expert"])
    before = [value for tokens, value in zip(x, y, strict=True) if tokens <= event["tokens"]]
    return before[-1] if before else None


def caption(run: Run) -> str:
    ends = [smoothed(values) for block in measured_blocks(run) for _, values in measured(run, block).values()]
    last = [float(values[-1]) for values in ends]
    shares = [float(values[-1] / values.max()) for values in ends if values.max() > 0]
    text = (
        "λ: largest eigenvalue of the expert's neural-tangent kernel on a sample of its own tokens, over the sample's "
        "size. Faint: as measured at every check; strong: mean of three checks in a row, which is what the freeze "
        f"policies read. e0, e1, …: experts. The last means of {plural(len(ends), 'expert')} lie from "
        f"{significant(min(last))} to {significant(max(last))}"
    )
    if shares:
        text += f", each at {percent(min(shares), 0)} to {percent(max(shares), 0)} of its own peak"
    return f"{text}. {plural(len(run.of_kind('freeze')), 'freeze')}, {plural(len(run.of_kind('thaw')), 'thaw')}."


FIGURE = FigureKind(
    name="trainability",
    title="Trainability by expert",
    reading="An expert whose strong line has stopped moving, far below its own peak, has little left to learn and may "
    "be frozen; a triangle that points down marks where that was done. Its line goes on if it is still measured, to "
    "thaw it should λ come back.",
    missing=missing,
    draw=draw,
    caption=caption,
    of_blocks=True,
)
