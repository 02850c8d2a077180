"""Colours that colour-blind readers can tell apart, and the look that all figures share."""

import colorsys
from typing import Any

from matplotlib.colors import to_hex, to_rgb

INK = "#1f2328"
SOFT = "#8a9099"
GRID = "#e3e6ea"
# M. Okabe and K. Ito, Color Universal Design (2008), without its yellow, which is too pale on white; then indigo and
# wine of P. Tol, Colour Schemes (2021), because data with nine or ten domains is common.
QUALITATIVE = [
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"),
    *("#332288", "#882255"),
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "p", "<"]
SEQUENTIAL = "Blues"
DIVERGING = "PuOr_r"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def category_color(index: int) -> str:
    """Colour of the n-th domain, cluster or expert; colours repeat after ten."""
    return QUALITATIVE[index % len(QUALITATIVE)]


def category_marker(index: int) -> str:
    """Marker of the n-th category: tells categories apart where colours do not, and where colours repeat."""
    return MARKERS[(index + index // len(QUALITATIVE)) % len(MARKERS)]


def text_color(color: str) -> str:
    """The same hue, dark enough to be read as small text on white."""
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    return to_hex(colorsys.hls_to_rgb(hue, min(light, 0.3), saturation))
