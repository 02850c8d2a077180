"""Figure: which expert gets which domain's tokens, and how pure that is, at the last check."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocte_ds.report.facts import is_of_script
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import color_bar, outer_labels, panels
from mocte_ds.report.figures.load import loaded_blocks
from mocte_ds.report.figures.palette import INK, SEQUENTIAL
from mocte_ds.report.run import Row, Run
from mocte_ds.report.wording import integer, percent, spread

MOST_NUMBERS = 10


def last_loads(run: Run) -> dict[int, tuple[int, Row]]:
    """(tokens, check's entry) of the last check that knows the load by domain, by block."""
    found: dict[int, tuple[int, Row]] = {}
    for block in run.blocks:
        known = [moment for moment in run.block_history(block) if shares(run, moment[1])[0]]
        if known:
            found[block] = known[-1]
    return found


def missing(run: Run) -> str | None:
    if last_loads(run):
        return None
    if is_of_script(run) and loaded_blocks(run):
        return "the log names no domains; a script names them by engine.mocte.annotate."
    return "no block routes tokens yet, so no expert has a load."


def shares(run: Run, entry: Row) -> tuple[list[str], np.ndarray]:
    """Domains and the (domains, experts) share of each domain's tokens that each expert gets."""
    table, experts = entry.get("domain_load") or {}, run.experts[entry["block"]]
    names = [name for name in run.domains if len(table.get(name) or []) == experts and None not in table[name]]
    return names, np.array([table[name] for name in names], dtype=float)


def purities(run: Run) -> dict[str, dict[int, tuple[float, int]]]:
    """By domain and block: (share of the domain's tokens at the expert that gets most of them, that expert)."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for block, (_, entry) in last_loads(run).items():
        for name, row in zip(*shares(run, entry), strict=True):
            found.setdefault(name, {})[block] = (float(np.max(row)), int(np.argmax(row)))
    return found


def sampled(run: Run) -> list[int]:
    """Sampled tokens that each block's table is made of."""
    return [sum(value or 0 for value in entry.get("load") or []) for _, entry in last_loads(run).values()]


def draw(run: Run, narrow: bool) -> Figure:
    found = last_loads(run)
    most = max(len(shares(run, entry)[0]) for _, entry in found.values())
    sample = f"n = {spread(sampled(run))} sampled tokens per block"
    figure, axes = panels(len(found), narrow, max(1.6, 1.0 + 0.27 * most), sample, share=False)
    high = max(np.max(shares(run, entry)[1]) for _, entry in found.values())
    for axis, block in zip(axes, found, strict=True):
        names, table = shares(run, found[block][1])
        image = axis.imshow(100 * table, cmap=SEQUENTIAL, vmin=0, vmax=100 * high, aspect="auto")
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(table.shape[1]))
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_title(run.blocks[block])
        if table.shape[1] <= MOST_NUMBERS:
            for (row, column), value in np.ndenumerate(table):
                color = "white" if value > 0.6 * high else "black"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=7.5)
        _write_purity(axis, table)
    outer_labels(axes, "expert (number)", "domain")
    bar = color_bar(figure, image, axes, narrow, "load (% of the\ndomain's tokens)")
    bar.outline.set_visible(False)
    return figure


def _write_purity(axis: Axes, table: np.ndarray) -> None:
    """The largest share of every row, right of the row."""
    right = table.shape[1] - 0.4
    for row, value in enumerate(np.max(table, axis=1)):
        axis.text(right, row, f"{100 * value:.0f} %", va="center", fontsize=7.5, fontweight="bold", color=INK)
    axis.text(right, -0.6, "purity", va="bottom", fontsize=7.5, color=INK)


def caption(run: Run) -> str:
    found = last_loads(run)
    values = [share for by_block in purities(run).values() for share, _ in by_block.values()]
    experts = max(run.experts[block] for block in found)
    return (
        "Per cent of each domain's tokens that the router sends to each expert; the rows of a block add up to 100. "
        f"After {spread([tokens for tokens, _ in found.values()])} tokens. Purity: the largest share of the row, from "
        f"{percent(min(values), 0)} to {percent(max(values), 0)}; with {integer(experts)} experts an even spread has "
        f"{percent(1 / experts, 0)}."
    )


FIGURE = FigureKind(
    name="domains",
    title="Expert load and purity by domain",
    reading="A row with one dark cell is a domain that has an expert of its own; rows that all look alike mean that "
    "experts do not follow domains.",
    missing=missing,
    draw=draw,
    caption=caption,
    of_blocks=True,
)
