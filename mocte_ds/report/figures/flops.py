"""Figure: what the run spent its FLOPs on, and what freezing saved."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from mocte_ds.report.facts import is_of_script
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import legend, sheet
from mocte_ds.report.figures.palette import GRID, INK, QUALITATIVE, SOFT
from mocte_ds.report.ledger import OWN_WORK, SAVED, beside, overhead, saved, share, spent, total
from mocte_ds.report.run import Run
from mocte_ds.report.wording import flops, percent, plural

DOT: dict[str, Any] = {"ls": "", "marker": "o", "ms": 7, "mew": 1.6}
LOOKS = {
    "the model's own work": {**DOT, "color": QUALITATIVE[0]},
    "what MO-CTE adds": {**DOT, "color": QUALITATIVE[1]},
    "saved by freezing": {**DOT, "color": QUALITATIVE[2], "mfc": "white"},
    "beside training": {**DOT, "color": SOFT, "mfc": "white"},
}


def missing(run: Run) -> str | None:
    if total(run):
        return None
    own = "FLOPs of a script's own model are not counted."
    return own if is_of_script(run) else "the run has not written its ledger of FLOPs yet."


def draw(run: Run, narrow: bool) -> Figure:
    rows = spent(run) + beside(run)
    whole = total(run)
    sample = f"n = {plural(len(run.metrics), 'step')}, {flops(whole)} FLOPs in all"
    figure = sheet(narrow, 1.0 + 0.27 * len(rows), sample)
    axis = figure.subplots()
    smallest = min(share(run, name) for name in rows if run.ledger[name] > 0)
    floor = 10.0 ** (int(f"{smallest:e}".split("e")[1]) - 1)
    looks = {}
    for height, name in enumerate(reversed(rows)):
        kind = _kind(name)
        looks[kind] = LOOKS[kind]
        _draw_row(axis, height, share(run, name), floor, LOOKS[kind], 1 if narrow else 2)
    axis.set_xscale("log")
    axis.set_xlim(floor, 1.3)
    axis.xaxis.set_major_locator(LogLocator(numticks=5 if narrow else 12))
    axis.xaxis.set_major_formatter(FuncFormatter(_percents))
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_yticks(range(len(rows)), [name.replace("_", " ") for name in reversed(rows)])
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.set_xlabel("share of all FLOPs (%, log)")
    axis.set_ylabel("component")
    legend(figure, narrow, {kind: look for kind, look in LOOKS.items() if kind in looks})
    return figure


def _percents(part: float, _position: int | None = None) -> str:
    return np.format_float_positional(100 * part, precision=3, fractional=False, trim="-")


def _kind(name: str) -> str:
    if name in SAVED:
        return "saved by freezing"
    if name == "validation":
        return "beside training"
    return "what MO-CTE adds" if name in OWN_WORK else "the model's own work"


def _draw_row(axis: Axes, height: int, part: float, floor: float, look: dict[str, Any], digits: int) -> None:
    """One component: a dot with its share, or the word for none."""
    axis.axhline(height, color=GRID, lw=0.7, zorder=0.5)
    left = part > 0.02
    if part > 0:
        axis.plot(part, height, **look)
    axis.annotate(
        percent(part, digits) if part > 0 else "none",
        (max(part, floor), height),
        (-9 if left else 9, 0),
        textcoords="offset points",
        va="center",
        ha="right" if left else "left",
        fontsize=8,
        bbox={"facecolor": "white", "lw": 0, "pad": 1},
    )


def caption(run: Run) -> str:
    text = f"All {flops(total(run))} floating-point operations of training. MO-CTE's own work is "
    text += f"{percent(overhead(run))} of them"
    if "wgrad_saved" in run.ledger:
        text += (
            f"; freezing saved weight gradients worth {percent(saved(run))} of what would have been spent without it"
        )
    if run.ledger.get("prefix_saved"):
        text += f"; the frozen front of the model saved {percent(share(run, 'prefix_saved'))} more"
    return f"{text}. The table below says what each component is."


FIGURE = FigureKind(
    name="flops",
    title="Ledger of FLOPs",
    reading="The axis is logarithmic, one grid line is a factor of ten; freezing pays in computation where the green "
    "circle lies right of the orange dots together.",
    missing=missing,
    draw=draw,
    caption=caption,
)
