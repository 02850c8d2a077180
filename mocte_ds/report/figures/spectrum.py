"""Figure: singular spectrum of the features of every block at the first check, at emergence and at the last check."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import EndLabel, label_ends, outer_labels, panels
from mocte_ds.report.figures.palette import QUALITATIVE
from mocte_ds.report.reader import Row, Run
from mocte_ds.report.wording import integer, percent, plural

MOMENTS = {
    "first check": (QUALITATIVE[0], "o"),
    "emergence": (QUALITATIVE[1], "s"),
    "last check": (QUALITATIVE[2], "^"),
}


def missing(run: Run) -> str | None:
    if not any(entry.get("singular_values") for check in run.checks for entry in check.get("blocks") or []):
        return "no check has measured a spectrum yet."
    return None


def moments(run: Run, block: int) -> dict[str, tuple[int, Row]]:
    """(tokens, check's entry) of a block at the first check, at emergence and at the last check, as far as they "
    "exist."""
    history = [(tokens, entry) for tokens, entry in run.block_history(block) if entry.get("singular_values")]
    if not history:
        return {}
    found = {"first check": history[0]}
    births = [event["tokens"] for event in run.of_kind("emergence") if event.get("block") == block]
    before = [moment for moment in history if births and moment[0] <= births[0]]
    if before:
        found["emergence"] = before[-1]
    if len(history) > 1:
        found["last check"] = history[-1]
    return found


def deviations(entry: Row) -> np.ndarray:
    """Standard deviation of the features along each direction: s / sqrt(n - 1), free of the sample's size."""
    return np.array(entry["singular_values"], dtype=float) / max(1, (entry.get("rows") or 2) - 1) ** 0.5


def draw(run: Run, narrow: bool) -> Figure:
    blocks = [block for block in run.blocks if moments(run, block)]
    figure, axes = panels(len(blocks), narrow, 2.2)
    positive = []
    for axis, block in zip(axes, blocks, strict=True):
        for name, (_, entry) in moments(run, block).items():
            values = deviations(entry)
            color, marker = MOMENTS[name]
            axis.plot(np.arange(1, len(values) + 1), values, color=color, marker=marker, ms=4, mec="white", mew=0.5)
            positive.append(values[values > 0])
        axis.set_title(run.blocks[block])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    outer_labels(axes, "singular direction (rank)", "standard deviation\n(feature units, log)")
    everything = np.concatenate(positive) if positive else np.ones(1)
    if everything.size:
        _log_axis(axes[0], everything.min(), everything.max())
    axes[0].set_xlim(left=0.7)
    label_ends([(axis, _ends(run, block)) for axis, block in zip(axes, blocks, strict=True)])
    return figure


def _ends(run: Run, block: int) -> list[EndLabel]:
    return [(deviations(entry)[-1], name, MOMENTS[name][0]) for name, (_, entry) in moments(run, block).items()]


def _log_axis(axis: Axes, low: float, high: float) -> None:
    axis.set_yscale("log")
    axis.set_ylim(low / 1.3, high * 1.3)
    if high / low < 300:
        # Few decades: plain numbers at 1, 2, 5 are easier than powers.
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def caption(run: Run) -> str:
    parts, rows = [], []
    for block in run.blocks:
        found = moments(run, block)
        rows += [entry.get("rows") or 0 for _, entry in found.values()]
        if found:
            first, last = found["first check"][1], list(found.values())[-1][1]
            parts.append(f"{run.blocks[block]} {_held(first)} at first, {_held(last)} at last")
    width = max(len(entry["singular_values"]) for b in run.blocks for _, entry in moments(run, b).values())
    size = integer(min(rows)) if min(rows) == max(rows) else f"{integer(min(rows))} to {integer(max(rows))}"
    return (
        f"Centred token features (input of the FFN), {size} sampled tokens a check, "
        f"{plural(len(run.checks), 'check')}. "
        f"The {width} directions that are followed hold, of the features' variance: {'; '.join(parts)}."
    )


def _held(entry: Row) -> str:
    shares = entry.get("explained")
    return percent(sum(shares), 1) if shares else "–"


FIGURE = FigureKind(
    name="spectrum",
    title="Singular spectrum of the features, by layer",
    reading="A steep fall means that few directions hold most of what differs between tokens; a curve that lifts or "
    "bends over time shows structure that has formed.",
    missing=missing,
    draw=draw,
    caption=caption,
)
