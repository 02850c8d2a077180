"""Figure: singular spectrum of the features of every block at the first check, at emergence and at the last check."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.labels import EndLabel, label_ends
from mocte_ds.report.figures.layout import log_axis, outer_labels, panels
from mocte_ds.report.figures.palette import QUALITATIVE
from mocte_ds.report.run import Row, Run
from mocte_ds.report.wording import MISSING, percent, plural, spread

MOMENTS = {
    "first check": (QUALITATIVE[0], "o"),
    "emergence": (QUALITATIVE[1], "s"),
    "last check": (QUALITATIVE[2], "^"),
}


def missing(run: Run) -> str | None:
    return None if measured_blocks(run) else "no check has measured a spectrum yet."


def measured_blocks(run: Run) -> list[int]:
    """Blocks with at least one spectrum."""
    return [block for block in run.blocks if moments(run, block)]


def moments(run: Run, block: int) -> dict[str, Row]:
    """The checks' entries of a block at the first check, at emergence and at the last check, as far as they exist."""
    history = [(tokens, entry) for tokens, entry in run.block_history(block) if entry.get("singular_values")]
    if not history:
        return {}
    found = {"first check": history[0][1]}
    births = [event["tokens"] for event in run.of_kind("emergence") if event.get("block") == block]
    before = [entry for tokens, entry in history if births and tokens <= births[0]]
    if before:
        found["emergence"] = before[-1]
    if len(history) > 1:
        found["last check"] = history[-1][1]
    return found


def deviations(entry: Row) -> np.ndarray:
    """Standard deviation of the features along each direction: s / sqrt(n - 1), free of the sample's size."""
    return np.array(entry["singular_values"], dtype=float) / max(1, (entry.get("rows") or 2) - 1) ** 0.5


def draw(run: Run, narrow: bool) -> Figure:
    blocks = measured_blocks(run)
    rows = [entry.get("rows") or 0 for block in blocks for entry in moments(run, block).values()]
    figure, axes = panels(len(blocks), narrow, 2.2, f"n = {spread(rows)} sampled tokens per check and block")
    positive, ends = [], []
    for axis, block in zip(axes, blocks, strict=True):
        labels: list[EndLabel] = []
        for name, entry in moments(run, block).items():
            values, (color, marker) = deviations(entry), MOMENTS[name]
            axis.plot(np.arange(1, len(values) + 1), values, color=color, marker=marker, ms=4, mec="white", mew=0.5)
            positive.append(values[values > 0])
            labels.append((values[-1], name, color))
        axis.set_title(run.blocks[block])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        ends.append((axis, labels))
    outer_labels(axes, "singular direction (rank)", "standard deviation\n(feature units, log)")
    everything = np.concatenate(positive)
    if everything.size:
        log_axis(axes[0], everything.min(), everything.max())
    axes[0].set_xlim(left=0.7)
    label_ends(ends)
    return figure


def caption(run: Run) -> str:
    found = [moments(run, block) for block in measured_blocks(run)]
    width = max(len(entry["singular_values"]) for moment in found for entry in moment.values())
    first = [held(moment["first check"]) for moment in found]
    born = [held(moment["emergence"]) for moment in found if "emergence" in moment]
    last = [held(list(moment.values())[-1]) for moment in found]
    between = f", {_range(born)} at emergence" if any(value is not None for value in born) else ""
    return (
        "Spread of the token features (the input of the FFN, centred) along their leading directions, strongest first, "
        f"at the first check, at emergence and at the last of {plural(len(run.checks), 'check')}. The {width} "
        f"directions hold {_range(first)} of the features' variance at the first check{between} and "
        f"{_range(last)} at the last, depending on the block."
    )


def held(entry: Row) -> float | None:
    """Share of the features' variance that the directions hold."""
    shares = [value for value in entry.get("explained") or [] if value is not None]
    return sum(shares) if shares else None


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    low, high = percent(min(known), 1), percent(max(known), 1)
    return low if low == high else f"{low} to {high}"


FIGURE = FigureKind(
    name="spectrum",
    title="Singular spectrum of the features, by layer",
    reading="A steep fall means that few directions hold most of what differs between tokens; a curve that lifts or "
    "bends over time shows structure that has formed.",
    missing=missing,
    draw=draw,
    caption=caption,
    of_blocks=True,
)
