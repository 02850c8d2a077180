"""Figure: bytes of optimizer state on every rank over time."""

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import label_ends, sheet, token_axis
from mocte_ds.report.figures.marks import emergence_lines
from mocte_ds.report.figures.palette import INK, category_color
from mocte_ds.report.reader import Run
from mocte_ds.report.wording import byte_unit, plural, size


def missing(run: Run) -> str | None:
    return None if by_rank(run).size else "the log has no optimizer bytes."


def by_rank(run: Run) -> np.ndarray:
    """(steps, ranks) bytes; NaN where the log has none; empty if it never has."""
    ranks = max((len(row.get("optimizer_bytes") or []) for row in run.metrics), default=0)
    table = np.full((len(run.metrics), ranks), np.nan)
    for place, row in enumerate(run.metrics):
        for rank, value in enumerate(row.get("optimizer_bytes") or []):
            table[place, rank] = np.nan if value is None else value
    return table if np.isfinite(table).any() else np.zeros((0, 0))


def draw(run: Run, narrow: bool) -> Figure:
    table = by_rank(run)
    tokens = np.array([row["tokens"] for row in run.metrics])
    figure = sheet(narrow, 2.7)
    axis = figure.subplots()
    factor, unit = byte_unit(float(np.nanmax(table)))
    labels = []
    # Ranks are nearly alike: lines beneath are wider, so that none is hidden.
    groups = _alike(table)
    widths = np.linspace(min(1.6 + 1.6 * (len(groups) - 1), 7), 1.6, len(groups))
    for index, ranks in enumerate(groups):
        values = table[:, ranks[0]] / factor
        # The log of a step tells what lay on the rank during that step, so a step up or down stands before its row.
        axis.plot(tokens, values, drawstyle="steps-pre", color=category_color(index), lw=widths[index])
        finite = values[np.isfinite(values)]
        labels.append((finite[-1] if finite.size else np.nan, _names(ranks), category_color(index)))
    for event in run.of_kind("freeze", "thaw"):
        after = [value for value in event.get("optimizer_bytes_after") or [] if value is not None]
        if after:
            marker = "v" if event["event"] == "freeze" else "^"
            axis.plot(event["tokens"], max(after) / factor, marker, color=INK, ms=6, mec="white", mew=0.8)
    emergence_lines(axis, run)
    axis.set_ylim(0, float(np.nanmax(table)) / factor * 1.08)
    axis.set_ylabel(f"optimizer state ({unit})")
    axis.set_xlabel(token_axis(axis, run.tokens))
    label_ends([(axis, labels)])
    return figure


def _alike(table: np.ndarray) -> list[list[int]]:
    """Ranks with the same history together, so that no line hides another."""
    groups: list[list[int]] = []
    for rank in range(table.shape[1]):
        for group in groups:
            if np.array_equal(table[:, group[0]], table[:, rank], equal_nan=True):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups


def _names(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return "ranks " + ", ".join(str(rank) for rank in ranks)


def caption(run: Run) -> str:
    table = by_rank(run)
    known = table[np.isfinite(table).any(1)]
    first, last, peak = (np.nansum(row) for row in (known[0], known[-1], known[np.nansum(known, axis=1).argmax()]))
    text = (
        f"fp32 master weights and optimizer moments on {plural(table.shape[1], 'rank')}, "
        f"{plural(len(known), 'step')}; all "
        f"ranks together {size(first)} at first, {size(peak)} at most, {size(last)} at last."
    )
    if run.of_kind("emergence"):
        text += " Dashed lines: emergence."
    if run.of_kind("freeze", "thaw"):
        text += " Triangles: freeze (down), thaw (up)."
    return text


FIGURE = FigureKind(
    name="optimizer",
    title="Optimizer state on every rank",
    reading="Emergence adds the moments of the new experts; every freeze must take a step down, or freezing frees "
    "nothing.",
    missing=missing,
    draw=draw,
    caption=caption,
)
