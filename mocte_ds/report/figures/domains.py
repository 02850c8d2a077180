"""Figure: which expert gets which domain's tokens, at the last check."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import outer_labels, panels
from mocte_ds.report.figures.palette import SEQUENTIAL
from mocte_ds.report.reader import Row, Run
from mocte_ds.report.wording import decimal, integer, plural

MOST_NUMBERS = 10


def last_loads(run: Run) -> dict[int, tuple[int, Row]]:
    """(tokens, check's entry) of the last check that knows the load by domain, by block."""
    found: dict[int, tuple[int, Row]] = {}
    for block in run.blocks:
        known = [moment for moment in run.block_history(block) if moment[1].get("domain_load")]
        if known:
            found[block] = known[-1]
    return found


def missing(run: Run) -> str | None:
    return None if last_loads(run) else "no block routes tokens yet, so no expert has a load."


def shares(run: Run, entry: Row) -> tuple[list[str], np.ndarray]:
    """Domains and the (domains, experts) share of each domain's tokens that each expert gets."""
    table = {name: row for name, row in entry["domain_load"].items() if row}
    names = [name for name in run.domains if name in table]
    return names, np.array([[np.nan if v is None else v for v in table[name]] for name in names], dtype=float)


def draw(run: Run, narrow: bool) -> Figure:
    found = last_loads(run)
    most = max(len(shares(run, entry)[0]) for _, entry in found.values())
    figure, axes = panels(len(found), narrow, 0.9 + 0.3 * most, share_x=False, share_y=False)
    image: AxesImage | None = None
    high = max(np.nanmax(shares(run, entry)[1]) for _, entry in found.values())
    for axis, block in zip(axes, sorted(found), strict=True):
        names, table = shares(run, found[block][1])
        image = axis.imshow(100 * table, cmap=SEQUENTIAL, vmin=0, vmax=100 * high, aspect="auto")
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(table.shape[1]))
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_title(_title(run, block, found[block][1]))
        if table.shape[1] <= MOST_NUMBERS:
            for (row, column), value in np.ndenumerate(table):
                color = "white" if value > 0.6 * high else "black"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=7.5)
    outer_labels(axes, "expert (number)", "domain")
    bar = figure.colorbar(image, ax=axes, location="bottom" if narrow else "right", shrink=0.8, fraction=0.06, pad=0.02)
    bar.set_label("% of the domain's tokens" if narrow else "% of domain")
    bar.outline.set_visible(False)
    return figure


def _title(run: Run, block: int, entry: Row) -> str:
    purity, nmi = entry.get("purity"), entry.get("nmi")
    text = run.blocks[block]
    return text if purity is None or nmi is None else f"{text}: purity {purity:.2f}, NMI {nmi:.2f}"


def caption(run: Run) -> str:
    parts = []
    for block, (tokens, entry) in sorted(last_loads(run).items()):
        load = [value for value in entry.get("load") or [] if value is not None]
        text = f"{run.blocks[block]} after {integer(tokens)} tokens"
        if load and sum(load):
            uneven = max(load) * len(load) / sum(load)
            text += f": {integer(sum(load))} sampled tokens, load max/mean {decimal(uneven, 2)}"
        if entry.get("documents"):
            text += f", purity and NMI of {plural(entry['documents'], 'document')}"
        parts.append(text)
    return (
        "Per cent of each domain's tokens that the router sends to each expert; rows add up to 100. By block: "
        f"{'; '.join(parts)}."
    )


FIGURE = FigureKind(
    name="domains",
    title="Expert load by domain",
    reading="A row with one dark cell is a domain that has an expert of its own; rows that all look alike mean that "
    "experts do not follow domains.",
    missing=missing,
    draw=draw,
    caption=caption,
)
