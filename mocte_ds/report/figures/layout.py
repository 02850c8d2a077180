"""Sheets of small multiples in two widths: a wide one for screens, a narrow one for phones."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mocte_ds.report.wording import count_unit

MOST_PIXELS = 60_000
"""Height of the largest picture that the renderer can make, nearly."""
WIDE_INCHES, WIDE_DPI, WIDE_LETTERS = 9.6, 150, 150
NARROW_INCHES, NARROW_DPI, NARROW_LETTERS = 4.0, 220, 60
NOTE_INCHES = 0.15
BAR_INCHES = (2.4, 0.1)
"""Length and breadth of a colour bar."""


def sheet(narrow: bool, height: float, sample: str) -> Figure:
    """An empty figure of the page's width.

    Args:
        narrow: draw for a phone.
        height: in inches, without the line of the sample.
        sample: sample sizes, written below everything.
    """
    width, dpi, letters = (
        (NARROW_INCHES, NARROW_DPI, NARROW_LETTERS) if narrow else (WIDE_INCHES, WIDE_DPI, WIDE_LETTERS)
    )
    lines = textwrap.wrap(sample, letters)
    height += NOTE_INCHES * len(lines)
    figure = Figure(figsize=(width, height), dpi=min(dpi, MOST_PIXELS / height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5)
    return figure


def columns_for(count: int, narrow: bool) -> int:
    """Panels side by side: one on a phone, two or three on a screen."""
    if narrow:
        return 1
    return 3 if count in (3, 6, 9) or count > 10 else min(2, count)


def panels(
    count: int, narrow: bool, height: float, sample: str, share: bool = True, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A sheet of ``count`` panels of ``height`` inches.

    Args:
        count: number of panels.
        narrow: draw for a phone.
        height: of one panel, in inches.
        sample: sample sizes, written below the panels.
        share: all panels have one x axis and one y axis, so that they compare.
        columns: panels side by side; None: as many as fit.
    """
    columns = columns or columns_for(count, narrow)
    rows = -(-count // columns)
    figure = sheet(narrow, rows * height + 0.3, sample)
    grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
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
        assert spec is not None  # every panel is one of a grid
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


def log_axis(axis: Axes, low: float, high: float) -> None:
    """A logarithmic y axis with room for values from ``low`` to ``high``."""
    axis.set_yscale("log")
    axis.set_ylim(low / 1.3, high * 1.3)
    if high / low < 300:
        # Few decades: plain numbers at 1, 2, 5 are easier than powers.
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def color_bar(figure: Figure, image: ScalarMappable, axes: Sequence[Axes], narrow: bool, label: str) -> Colorbar:
    """A colour bar of fixed size, right of all panels or below them."""
    # A fraction of what the panels take, not of the whole figure.
    across = max(0.5, figure.get_figheight() - 1.2) if narrow else figure.get_figwidth()
    bar = figure.colorbar(
        image,
        ax=list(axes),
        location="bottom" if narrow else "right",
        fraction=BAR_INCHES[1] / across,
        shrink=min(1.0, BAR_INCHES[0] / (figure.get_figwidth() if narrow else figure.get_figheight())),
        aspect=BAR_INCHES[0] / BAR_INCHES[1],
        pad=BAR_INCHES[1] / across,
    )
    bar.set_label(label, fontsize=8)
    return bar


def legend(figure: Figure, narrow: bool, looks: Mapping[str, Mapping[str, Any]], most: int = 10) -> None:
    """Say what lines and marks mean, above the panels, where nothing is covered.

    Args:
        figure: made by :func:`sheet`.
        narrow: two columns instead of one row.
        looks: properties of a line by what it means.
        most: of them side by side on a screen.
    """
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    columns = 2 if narrow else min(most, max(1, len(handles)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=7.5)
