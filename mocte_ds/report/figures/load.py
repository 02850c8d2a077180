"""Figure: how evenly tokens spread over the experts of every block, over time."""

import numpy as np
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import color_bar, legend, outer_labels, panels, token_axis
from mocte_ds.report.figures.marks import KINDS, expert_events, legend_of_events
from mocte_ds.report.figures.palette import DIVERGING, INK
from mocte_ds.report.run import Run
from mocte_ds.report.wording import decimal, plural, spread

MOST_COLUMNS = 60
WARM_UP = "#dde1e6"
SMALLEST_RANGE, LARGEST_RANGE = 1.5, 4.0
TICKS = (0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4)
FINE_TICKS = (0.8, 0.9, 1.1, 1.25)


def missing(run: Run) -> str | None:
    return None if loaded_blocks(run) else "no block routes tokens yet, so no expert has a load."


def loaded_blocks(run: Run) -> list[int]:
    """Blocks whose experts got a token."""
    return [block for block in run.blocks if np.nansum(counts(run, block)) > 0]


def counts(run: Run, block: int) -> np.ndarray:
    """(steps, E) tokens of each expert at each step; NaN where the log has none."""
    table = np.full((len(run.metrics), run.experts.get(block, 0)), np.nan)
    for place, row in enumerate(run.metrics):
        load = row.get("expert_load") or []
        if block < len(load) and load[block] and len(load[block]) == table.shape[1]:
            table[place] = [np.nan if value is None else value for value in load[block]]
    return table


def binned(run: Run, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Load over even load: (borders in tokens (bins + 1,), (E, bins) share of the tokens times E)."""
    table = counts(run, block)
    tokens = np.array([row["tokens"] for row in run.metrics], dtype=float)
    starts = np.arange(0, len(tokens), bin_steps(run))
    borders = np.concatenate([[0.0], tokens[np.append(starts[1:] - 1, len(tokens) - 1)]])
    summed = np.add.reduceat(np.nan_to_num(table), starts, axis=0)
    total = summed.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return borders, np.where(total > 0, summed / total * table.shape[1], np.nan).T


def bin_steps(run: Run) -> int:
    """Steps that one column of the figure adds up."""
    return max(1, -(-len(run.metrics) // MOST_COLUMNS))


def unevenness(run: Run, block: int) -> tuple[float, float]:
    """Largest load over mean load of a block: (over the whole run, over the last column of the figure)."""
    table = counts(run, block)
    table = np.nan_to_num(table[np.nansum(table, axis=1) > 0])
    whole, last = table.sum(0), table[-bin_steps(run) :].sum(0)
    return float(whole.max() / whole.mean()), float(last.max() / last.mean())


def color_range(run: Run) -> float:
    """Largest load over even load, or even load over load, that the colours tell apart."""
    both = [np.nan_to_num(binned(run, block)[1], nan=1.0).clip(1e-6) for block in loaded_blocks(run)]
    largest = max(float(np.exp(np.abs(np.log(values)).max())) for values in both)
    return min(max(largest, SMALLEST_RANGE), LARGEST_RANGE)


def draw(run: Run, narrow: bool) -> Figure:
    blocks = loaded_blocks(run)
    most = max(run.experts[block] for block in blocks)
    steps = [int((np.nansum(counts(run, block), axis=1) > 0).sum()) for block in blocks]
    sample = (
        f"n = {spread(steps)} steps with experts, every routed token; a column adds up {plural(bin_steps(run), 'step')}"
    )
    figure, axes = panels(len(blocks), narrow, max(1.6, 0.9 + 0.2 * most), sample, share=False)
    darkest, brightest = 1 / color_range(run), color_range(run)
    norm = LogNorm(darkest, brightest)
    for axis, block in zip(axes, blocks, strict=True):
        borders, relative = binned(run, block)
        rows = np.arange(relative.shape[0] + 1) - 0.5
        # An expert without a token is at the dark end, not white: a logarithm has no zero.
        mesh = axis.pcolormesh(borders, rows, np.maximum(relative, darkest), cmap=DIVERGING, norm=norm)
        axis.set_facecolor(WARM_UP)
        for event in expert_events(run, block):
            axis.plot(event["tokens"], event["expert"], KINDS[event["event"]], color=INK, ms=6, mec="white", mew=0.8)
        axis.set_yticks(range(relative.shape[0]))
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.set_title(run.blocks[block])
        name = token_axis(axis, run.tokens)
        axis.set_xlim(0, run.tokens)
    outer_labels(axes, name, "expert (number)")
    bar = color_bar(figure, mesh, axes, narrow, "load (1 = even share)")
    _set_ticks(bar, darkest, brightest)
    warm_up = {"ls": "", "marker": "s", "color": WARM_UP, "ms": 8}
    legend(figure, narrow, {"warm-up": warm_up} | legend_of_events(run, "freeze", "thaw"))
    return figure


def _set_ticks(bar: Colorbar, lowest: float, highest: float) -> None:
    ticks = [tick for tick in TICKS if lowest <= tick <= highest]
    if len(ticks) > 6:
        ticks = [tick for tick in ticks if tick not in FINE_TICKS]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
    bar.ax.minorticks_off()


def caption(run: Run) -> str:
    blocks = loaded_blocks(run)
    whole, last = zip(*(unevenness(run, block) for block in blocks), strict=True)
    worst = run.blocks[blocks[int(np.argmax(last))]]
    return (
        "Tokens routed to each expert over what an even split would give; each column adds up "
        f"{plural(bin_steps(run), 'step')}. The busiest expert of a block got {decimal(min(whole), 2)} to "
        f"{decimal(max(whole), 2)} times its even share over the whole run, and at the end at most "
        f"{decimal(max(last), 2)} times ({worst})."
    )


FIGURE = FigureKind(
    name="load",
    title="Expert load over time",
    reading="Pale rows are in balance; a row that stays dark purple is an expert that hardly gets tokens, dark "
    "orange one that gets too many. No token is dropped: a busy expert costs time, not quality.",
    missing=missing,
    draw=draw,
    caption=caption,
    of_blocks=True,
)
