"""Sheets of small multiples in two widths: a wide one for screens, a narrow one for phones."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mocte_ds.report.figures.palette import text_color
from mocte_ds.report.wording import count_unit

WIDE_INCHES, WIDE_DPI = 9.6, 150
NARROW_INCHES, NARROW_DPI = 4.0, 220
LINE_POINTS = 10.0

EndLabel = tuple[float, str, str]
"""Where a line ends (y in data units), its name, its colour."""


def sheet(narrow: bool, height: float) -> Figure:
    """An empty figure of the page's width and ``height`` inches."""
    figure = Figure(
        figsize=(NARROW_INCHES if narrow else WIDE_INCHES, height),
        dpi=NARROW_DPI if narrow else WIDE_DPI,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    return figure


def columns_for(count: int, narrow: bool) -> int:
    """Panels side by side: one on a phone, two or three on a screen."""
    if narrow:
        return 1
    return 3 if count in (3, 6, 9) or count > 10 else min(2, count)


def panels(
    count: int,
    narrow: bool,
    height: float,
    share_x: bool = True,
    share_y: bool = True,
    columns: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """A sheet of ``count`` panels of ``height`` inches.

    Args:
        count: number of panels.
        narrow: draw for a phone.
        height: of one panel, in inches.
        share_x: all panels have one x axis.
        share_y: all panels have one y axis, so that heights compare.
        columns: panels side by side; None: as many as fit.
    """
    columns = columns or columns_for(count, narrow)
    rows = -(-count // columns)
    figure = sheet(narrow, rows * height + 0.3)
    grid = figure.subplots(rows, columns, sharex=share_x, sharey=share_y, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    for axis in axes[max(0, count - columns) : count]:
        axis.tick_params(labelbottom=True)
    return figure, axes[:count]


def outer_labels(axes: Sequence[Axes], x: str, y: str) -> None:
    """Name the x axis of the lowest panel of each column and the y axis of the first panel of each row."""
    lowest: dict[int, Axes] = {}
    for axis in axes:
        spec = axis.get_subplotspec()
        lowest[spec.colspan.start] = axis
        if spec.is_first_col():
            axis.set_ylabel(y)
    for axis in lowest.values():
        axis.set_xlabel(x)


def token_axis(axis: Axes, largest: float) -> str:
    """Show tokens in a unit that fits; returns the axis's name with its unit."""
    factor, unit = count_unit(largest)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    axis.set_xlim(0, largest * 1.01 if largest else 1)
    return f"tokens seen ({unit})" if unit else "tokens seen"


def label_ends(panels: Sequence[tuple[Axes, Sequence[EndLabel]]]) -> None:
    """Write names right of panels at the heights where lines end, pushed apart where they would overlap.

    Args:
        panels: all panels of one figure, with limits as they will stay, each with the labels of its lines.
    """
    if not panels:
        return
    # Heights in points are known only after the layout.
    panels[0][0].figure.draw_without_rendering()
    for axis, labels in panels:
        _label_panel(axis, [label for label in labels if np.isfinite(label[0])])


def _label_panel(axis: Axes, labels: Sequence[EndLabel]) -> None:
    points_per_pixel = 72 / axis.figure.dpi
    bottom, top = axis.bbox.y0 * points_per_pixel, axis.bbox.y1 * points_per_pixel
    wanted = np.array([axis.transData.transform((0, y))[1] for y, _, _ in labels]) * points_per_pixel
    wanted = np.clip(wanted, bottom, top)
    for (_, text, color), at, y in zip(labels, wanted, push_apart(wanted, LINE_POINTS), strict=True):
        axis.annotate(
            text,
            xy=(1.0, (at - bottom) / (top - bottom)),
            xycoords="axes fraction",
            xytext=(9, y - at),
            textcoords="offset points",
            color=text_color(color),
            fontsize=8,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def push_apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Heights closest to ``wanted`` (least squares) in the same order with at least ``gap`` between neighbours.

    Pool-adjacent-violators on the heights less their rank times ``gap``.
    """
    order = np.argsort(wanted, kind="stable")
    targets = wanted[order] - gap * np.arange(len(wanted))
    pools: list[list[float]] = []
    for target in targets:
        pools.append([target, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + mean * weight) / (before[1] + weight)
            before[1] += weight
    flat = np.concatenate([np.full(int(weight), mean) for mean, weight in pools])
    placed = np.empty(len(wanted))
    placed[order] = flat + gap * np.arange(len(wanted))
    return placed
