"""Figure: bytes of optimizer state on every rank over time."""

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.labels import label_ends
from mocte_ds.report.figures.layout import legend, sheet, token_axis
from mocte_ds.report.figures.marks import KINDS, emergence_lines, legend_of_events
from mocte_ds.report.figures.palette import INK, category_color
from mocte_ds.report.run import Row, Run
from mocte_ds.report.wording import byte_unit, listing, plural, size

ALIKE = 0.02
"""Ranks whose sizes differ by less than this share of the largest size are drawn as one line."""


def missing(run: Run) -> str | None:
    return None if by_rank(run).size else "the log has no optimizer bytes."


def by_rank(run: Run) -> np.ndarray:
    """(steps, ranks) bytes; NaN where the log has none; empty if it never has."""
    ranks = max((len(row.get("optimizer_bytes_by_rank") or []) for row in run.metrics), default=0)
    table = np.full((len(run.metrics), ranks), np.nan)
    for place, row in enumerate(run.metrics):
        for rank, value in enumerate(row.get("optimizer_bytes_by_rank") or []):
            table[place, rank] = np.nan if value is None else value
    return table if np.isfinite(table).any() else np.zeros((0, 0))


def draw(run: Run, narrow: bool) -> Figure:
    table = by_rank(run)
    tokens = np.array([row["tokens"] for row in run.metrics])
    figure = sheet(narrow, 3.0, f"n = {plural(len(run.metrics), 'step')} on {plural(table.shape[1], 'rank')}")
    axis = figure.subplots()
    factor, unit = byte_unit(float(np.nanmax(table)))
    labels = []
    for index, ranks in enumerate(alike(table)):
        values = np.fmax.reduce(table[:, ranks], axis=1) / factor
        # The log of a step tells what lay on the rank during that step, so a step up or down stands before its row.
        axis.plot(tokens, values, drawstyle="steps-pre", color=category_color(index))
        finite = values[np.isfinite(values)]
        labels.append((finite[-1] if finite.size else np.nan, _names(ranks), category_color(index)))
    for event in run.of_kind("freeze", "thaw"):
        for value in changed(event):
            axis.plot(event["tokens"], value / factor, KINDS[event["event"]], color=INK, ms=6, mec="white", mew=0.8)
    emergence_lines(axis, run)
    axis.set_ylim(0, float(np.nanmax(table)) / factor * 1.08)
    axis.set_ylabel(f"optimizer state ({unit})")
    axis.set_xlabel(token_axis(axis, run.tokens))
    legend(figure, narrow, legend_of_events(run, "emergence", "freeze", "thaw"))
    label_ends([(axis, labels)])
    return figure


def changed(event: Row) -> list[float]:
    """Bytes after an event on every rank whose bytes it changed: the ranks that hold the expert."""
    before, after = event.get("optimizer_bytes_by_rank_before") or [], event.get("optimizer_bytes_by_rank_after") or []
    return [now for then, now in zip(before, after, strict=False) if now is not None and now != then]


def alike(table: np.ndarray) -> list[list[int]]:
    """Ranks whose sizes are nearly the same all the time, together, so that no line hides another."""
    groups: list[list[int]] = []
    near = ALIKE * float(np.nanmax(table))
    for rank in range(table.shape[1]):
        for group in groups:
            if np.allclose(table[:, group[0]], table[:, rank], rtol=0, atol=near, equal_nan=True):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups


def _names(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' if len(ranks) > 1 else ''} {listing([str(rank) for rank in ranks])}"


def totals(run: Run) -> tuple[float, float, float]:
    """Bytes on all ranks together: (at the first step, at most, at the last step)."""
    sums = [float(np.nansum(row)) for row in by_rank(run) if np.isfinite(row).any()]
    return sums[0], max(sums), sums[-1]


def before_experts(run: Run) -> float | None:
    """Bytes on all ranks together in the last step before experts emerged: masters and moments of the dense model.

    None where no experts have emerged, or the log has no such step with moments.
    """
    births = [event["step"] for event in run.of_kind("emergence")]
    rows = [row for row in run.metrics if births and row["step"] <= min(births)]
    known = [row.get("optimizer_bytes_by_rank") or [None] for row in rows[1:]]  # the first step has no moments yet
    return float(sum(known[-1])) if known and None not in known[-1] else None


def caption(run: Run) -> str:
    first, peak, last = totals(run)
    dense = before_experts(run)
    start = f"{size(first)} in the first step, before there are moments"
    start += f", {size(dense)} with them while the model was dense" if dense is not None else ""
    text = (
        "fp32 master weights and optimizer moments, on each rank (process) of the run; all ranks together "
        f"{start}, {size(peak)} at most, {size(last)} at last."
    )
    if run.of_kind("freeze", "thaw"):
        text += " Triangles: on the ranks that hold the expert."
    if len(alike(by_rank(run))) < by_rank(run).shape[1]:
        text += f" Ranks that differ by less than {100 * ALIKE:g} % share a line, which shows the largest of them."
    return text


FIGURE = FigureKind(
    name="optimizer",
    title="Optimizer state on every rank",
    reading="Emergence adds the state of the new experts; every freeze must take a step down, or freezing frees "
    "nothing.",
    missing=missing,
    draw=draw,
    caption=caption,
)
