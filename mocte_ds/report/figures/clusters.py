"""Figure: number of clusters, silhouette, stability and agreement with domains, by layer over time."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mocte_ds.report.facts import setting
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import columns_for, label_ends, sheet, token_axis
from mocte_ds.report.figures.marks import emergence_lines
from mocte_ds.report.figures.palette import INK, QUALITATIVE, SOFT
from mocte_ds.report.reader import Run
from mocte_ds.report.wording import integer, listing, plural

INDICES = {"silhouette": QUALITATIVE[0], "stability": QUALITATIVE[1], "nmi": QUALITATIVE[2], "purity": QUALITATIVE[3]}
NAMES = {"nmi": "NMI"}


def missing(run: Run) -> str | None:
    if not any(entry.get("clusters") is not None for check in run.checks for entry in check.get("blocks") or []):
        return "no check has looked for clusters yet."
    return None


def series(run: Run, block: int, key: str) -> tuple[list[int], list[float]]:
    """(tokens, value) of one number of a block, where a check has it."""
    found = [(tokens, entry[key]) for tokens, entry in run.block_history(block) if entry.get(key) is not None]
    return [tokens for tokens, _ in found], [value for _, value in found]


def draw(run: Run, narrow: bool) -> Figure:
    blocks = [block for block in run.blocks if series(run, block, "clusters")[0]]
    columns = columns_for(len(blocks), narrow)
    rows = -(-len(blocks) // columns)
    figure = sheet(narrow, 3.4 * rows + 0.2)
    ratios = [1, 1.9] * rows
    grid = figure.subplots(2 * rows, columns, sharex=True, squeeze=False, height_ratios=ratios)
    most = max(max(series(run, block, "clusters")[1]) for block in blocks)
    labelled = []
    for place, block in enumerate(blocks):
        row, column = divmod(place, columns)
        count, index = grid[2 * row, column], grid[2 * row + 1, column]
        _draw_count(count, run, block, most)
        labels = []
        for key, color in INDICES.items():
            x, y = series(run, block, key)
            if x:
                marker = "o" if len(x) == 1 else None
                index.plot(x, y, color=color, lw=1.3, marker=marker, ms=4)
                labels.append((y[-1], NAMES.get(key, key), color))
        values = [value for key in INDICES for value in series(run, block, key)[1]]
        index.set_ylim(min(-0.05, min(values, default=0) - 0.05), 1.05)
        for name, color in (("min_silhouette", INDICES["silhouette"]), ("stability", INDICES["stability"])):
            needed = setting(run, "clusters", name)
            if isinstance(needed, (int, float)):
                index.axhline(needed, color=color, lw=0.8, ls=":")
        emergence_lines(count, run, block)
        emergence_lines(index, run, block)
        index.set_xlabel(token_axis(index, run.tokens))
        index.tick_params(labelbottom=True)
        count.set_title(run.blocks[block])
        if column == 0:
            count.set_ylabel("clusters K\n(count)")
            index.set_ylabel("index (no unit)")
        labelled.append((index, labels))
    for unused in range(len(blocks), rows * columns):
        row, column = divmod(unused, columns)
        grid[2 * row, column].remove()
        grid[2 * row + 1, column].remove()
    label_ends(labelled)
    return figure


def _draw_count(axis, run: Run, block: int, most: int) -> None:  # noqa: ANN001
    history = [
        (t, e["clusters"], bool(e.get("found"))) for t, e in run.block_history(block) if e.get("clusters") is not None
    ]
    tokens, counts = [t for t, _, _ in history], [k for _, k, _ in history]
    axis.plot(tokens, counts, color=SOFT, lw=0.8, drawstyle="steps-mid")
    found = np.array([f for _, _, f in history])
    size = 4 if len(history) <= 60 else 2.5
    axis.plot(np.array(tokens)[found], np.array(counts)[found], "o", color=INK, ms=size)
    axis.plot(np.array(tokens)[~found], np.array(counts)[~found], "o", mfc="white", mec=INK, mew=0.7, ms=size)
    axis.set_ylim(-0.5, most + 0.8)
    axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def caption(run: Run) -> str:
    documents = [
        e.get("documents") or 0 for c in run.checks for e in c.get("blocks") or [] if e.get("clusters") is not None
    ]
    size = integer(min(documents))
    if min(documents) != max(documents):
        size += f" to {integer(max(documents))}"
    parts = []
    for block, label in run.blocks.items():
        entries = [entry for _, entry in run.block_history(block) if entry.get("clusters") is not None]
        if entries:
            good = sum(bool(entry.get("found")) for entry in entries)
            counts = [entry["clusters"] for entry in entries]
            parts.append(
                f"{label} K from {min(counts)} to {max(counts)}, accepted at {good} of {plural(len(entries), 'check')}"
            )
    thresholds = [
        f"{name} {value}"
        for name, value in (
            ("silhouette", setting(run, "clusters", "min_silhouette")),
            ("stability", setting(run, "clusters", "stability")),
        )
        if value is not None
    ]
    return (
        f"Density clusters of the document means ({size} documents a check). By block: {'; '.join(parts)}. Filled "
        f"dots: the check "
        "accepts the clusters; open dots: it does not. NMI and purity compare balanced clusters with the documents' "
        "domains."
        + (f" Dotted lines: the least {listing(thresholds)} for emergence." if thresholds else "")
        + (" Dashed line: emergence." if run.of_kind("emergence") else "")
    )


FIGURE = FigureKind(
    name="clusters",
    title="Clusters by layer over time",
    reading="Experts emerge when filled dots come twice in a row with a stability above its line; NMI and purity "
    "near 1 mean that clusters are the domains, near the bottom that they are something else.",
    missing=missing,
    draw=draw,
    caption=caption,
)
