"""Names written next to what they name: at the ends of lines, in the middle of clouds, without covering each other."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from mocte_ds.report.figures.palette import text_color

LINE_POINTS = 10.0

EndLabel = tuple[float, str, str]
"""Where a line ends (y in data units), its name, its colour."""


def label_ends(panels: Sequence[tuple[Axes, Sequence[EndLabel]]]) -> None:
    """Write names right of panels at the heights where lines end, pushed apart where they would overlap.

    Args:
        panels: all panels of one figure, with limits as they will stay, each with the labels of its lines.
    """
    if not panels:
        return
    # Heights in points are known only after the layout.
    _lay_out(panels[0][0])
    for axis, labels in panels:
        _label_panel(axis, [label for label in labels if np.isfinite(label[0])])


def _lay_out(axis: Axes) -> None:
    figure = axis.get_figure(root=True)
    if figure is not None:
        figure.draw_without_rendering()


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
    flat = np.concatenate([np.full(int(weight), mean) for mean, weight in pools]) if pools else np.zeros(0)
    placed = np.empty(len(wanted))
    placed[order] = flat + gap * np.arange(len(wanted))
    return placed


def label_clouds(panels: Sequence[tuple[Axes, Sequence[tuple[np.ndarray, str, str]]]]) -> None:
    """Write each name in the middle of its points, moved up where it would cover another name.

    Args:
        panels: all panels of one figure with limits as they will stay, each with (points (n, 2), name, colour).
    """
    written: list[list[Text]] = []
    for axis, clouds in panels:
        texts: list[Text] = []
        for points, name, color in clouds:
            x, y = np.nanmedian(points, axis=0)
            text = axis.annotate(
                name,
                (x, y),
                (0, 0),
                textcoords="offset points",
                color=text_color(color),
                fontsize=7.5,
                fontweight="bold",
                ha="center",
                va="center",
            )
            text.set_path_effects([withStroke(linewidth=2.2, foreground="white")])
            text.set_in_layout(False)
            texts.append(text)
        written.append(texts)
    if panels:
        _lay_out(panels[0][0])
    for group in written:
        _lift(group)


def _lift(texts: Sequence[Text]) -> None:
    """Go through names from the lowest to the highest and lift each over those that it would cover."""
    placed: list[tuple[float, float, float, float]] = []
    for text in sorted(texts, key=lambda text: text.get_window_extent().y0):
        box = text.get_window_extent()
        low, height = box.y0, box.height
        for left, right, bottom, top in sorted(placed, key=lambda other: other[2]):
            if box.x0 < right and box.x1 > left and low < top and low + height > bottom:
                low = top
        placed.append((box.x0, box.x1, low, low + height))
        text.set_position((0, (low - box.y0) * 72 / text.figure.dpi))
