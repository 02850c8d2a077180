"""Figure: number of clusters, silhouette, stability and agreement with domains, by layer over time."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mocte_ds.report.facts import MOCTE, fact
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.labels import EndLabel, label_ends
from mocte_ds.report.figures.layout import columns_for, legend, sheet, token_axis
from mocte_ds.report.figures.marks import emergence_lines, legend_of_events
from mocte_ds.report.figures.palette import INK, QUALITATIVE, SOFT
from mocte_ds.report.figures.trainability import smoothed
from mocte_ds.report.run import Run
from mocte_ds.report.wording import listing, plural, spread

INDICES = {"silhouette": QUALITATIVE[0], "stability": QUALITATIVE[1], "nmi": QUALITATIVE[2], "purity": QUALITATIVE[3]}
SMOOTHING = 5
"""Checks that a strong line averages: single checks, of some dozens of documents, jump."""
NAMES = {"nmi": "NMI"}
THRESHOLDS = {"silhouette": "min_silhouette", "stability": "stability"}
"""Setting that holds the least value for emergence."""


def missing(run: Run) -> str | None:
    return None if clustered_blocks(run) else "no check has looked for clusters yet."


def clustered_blocks(run: Run) -> list[int]:
    """Blocks of which at least one check counted clusters."""
    return [block for block in run.blocks if series(run, block, "clusters")[0]]


def series(run: Run, block: int, key: str) -> tuple[list[int], list[float]]:
    """(tokens, value) of one number of a block, where a check has it."""
    found = [(tokens, entry[key]) for tokens, entry in run.block_history(block) if entry.get(key) is not None]
    return [tokens for tokens, _ in found], [value for _, value in found]


def index_series(run: Run, block: int, key: str) -> tuple[list[int], list[float]]:
    """As :func:`series`; a silhouette only where there are two clusters, without which the log has 0."""
    found = [
        (tokens, entry[key])
        for tokens, entry in run.block_history(block)
        if entry.get(key) is not None and (key != "silhouette" or (entry.get("clusters") or 0) > 1)
    ]
    return [tokens for tokens, _ in found], [value for _, value in found]


def thresholds(run: Run) -> dict[str, float]:
    """Least values for emergence that run.json knows."""
    found = {name: fact(run, *MOCTE, "clusters", key) for name, key in THRESHOLDS.items()}
    return {name: value for name, value in found.items() if value is not None}


def draw(run: Run, narrow: bool) -> Figure:
    blocks = clustered_blocks(run)
    columns = columns_for(len(blocks), narrow)
    rows = -(-len(blocks) // columns)
    documents = [value for block in blocks for value in series(run, block, "documents")[1] if value]
    sample = f"n = {spread(documents)} documents per check; {plural(len(run.checks), 'check')}"
    figure = sheet(narrow, 3.3 * rows + 0.4, sample)
    grid = figure.subplots(2 * rows, columns, sharex=True, squeeze=False, height_ratios=[1, 1.9] * rows)
    most = max(max(series(run, block, "clusters")[1]) for block in blocks)
    ends = []
    for place, block in enumerate(blocks):
        row, column = divmod(place, columns)
        count, index = grid[2 * row, column], grid[2 * row + 1, column]
        _draw_count(count, run, block, most)
        ends.append((index, _draw_indices(index, run, block)))
        for axis in (count, index):
            emergence_lines(axis, run, block)
        index.set_xlabel(token_axis(index, run.tokens))
        index.tick_params(labelbottom=True)
        count.set_title(run.blocks[block])
        if column == 0:
            count.set_ylabel("clusters K\n(count)")
            index.set_ylabel("index (no unit)")
    for axis in [*grid[-2, len(blocks) - columns * (rows - 1) :], *grid[-1, len(blocks) - columns * (rows - 1) :]]:
        axis.remove()
    dot = {"ls": "", "marker": "o", "ms": 4, "mec": INK}
    looks: dict[str, dict[str, Any]] = {"accepted": {**dot, "mfc": INK}, "not accepted": {**dot, "mfc": "white"}}
    looks |= {"each check": {"color": INK, "lw": 0.6, "alpha": 0.3}, f"mean of {SMOOTHING} checks": {"color": INK}}
    looks |= {"least for emergence": {"color": SOFT, "ls": ":"}} if thresholds(run) else {}
    legend(figure, narrow, looks | legend_of_events(run, "emergence"))
    label_ends(ends)
    return figure


def _draw_count(axis: Axes, run: Run, block: int, most: float) -> None:
    history = [(tokens, entry) for tokens, entry in run.block_history(block) if entry.get("clusters") is not None]
    tokens, counts = np.array([t for t, _ in history]), np.array([entry["clusters"] for _, entry in history])
    axis.plot(tokens, counts, color=SOFT, lw=0.8, drawstyle="steps-mid")
    found = np.array([bool(entry.get("found")) for _, entry in history])
    size = 4 if len(history) <= 60 else 2.5
    axis.plot(tokens[found], counts[found], "o", color=INK, ms=size)
    axis.plot(tokens[~found], counts[~found], "o", mfc="white", mec=INK, mew=0.7, ms=size)
    axis.set_ylim(-0.5, most + 0.8)
    axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _draw_indices(axis: Axes, run: Run, block: int) -> list[EndLabel]:
    labels = []
    for key, color in INDICES.items():
        x, y = index_series(run, block, key)
        if x:
            axis.plot(x, y, color=color, lw=0.6, alpha=0.3, marker="o" if len(x) == 1 else None, ms=4)
            means = smoothed(y, SMOOTHING)
            axis.plot(x, means, color=color, lw=1.5)
            labels.append((means[-1], NAMES.get(key, key), color))
    lowest = min((value for key in INDICES for value in index_series(run, block, key)[1]), default=0.0)
    axis.set_ylim(min(-0.05, lowest - 0.05), 1.05)
    for name, needed in thresholds(run).items():
        axis.axhline(needed, color=INDICES[name], lw=0.9, ls=":")
    return labels


def caption(run: Run) -> str:
    entries = [
        entry
        for block in clustered_blocks(run)
        for _, entry in run.block_history(block)
        if entry.get("clusters") is not None
    ]
    good = sum(bool(entry.get("found")) for entry in entries)
    counts = [entry["clusters"] for entry in entries]
    needed = listing([f"{name} {value:g}" for name, value in thresholds(run).items()])
    return (
        f"Dense groups of documents, found without knowing their domains: {spread(counts)} in a block at a check, "
        f"accepted as clusters in {good} of {plural(len(entries), 'look')}. "
        + (f"Emergence needs at least {needed} at two checks in a row. " if needed else "")
        + f"Faint: each check; strong: mean of {SMOOTHING} checks in a row. A silhouette "
        "needs two clusters. Stability, NMI and purity are those of another clustering of the same documents, into as "
        "many parts as there are experts: with fewer experts than domains its purity cannot reach 1."
    )


FIGURE = FigureKind(
    name="clusters",
    title="Clusters by layer over time",
    reading="Experts emerge when filled dots come twice in a row with a stability above its dotted line. NMI and "
    "purity that rise mean that the clusters come to follow the documents' sources.",
    missing=missing,
    draw=draw,
    caption=caption,
    of_blocks=True,
)
