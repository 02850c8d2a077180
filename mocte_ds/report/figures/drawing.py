"""What a figure of the report is made of, and how it becomes PNG files."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from mocte_ds.report.facts import is_dense
from mocte_ds.report.figures.palette import STYLE
from mocte_ds.report.run import Run


@dataclass(frozen=True)
class FigureKind:
    """One figure of the report."""

    name: str
    """Name of its files."""
    title: str
    reading: str
    """One sentence on how to read it."""
    missing: Callable[[Run], str | None]
    """Why a run has nothing for it yet, or None."""
    draw: Callable[[Run, bool], Figure]
    """Draw it from a run's log; the second argument asks for the narrow version."""
    caption: Callable[[Run], str]
    """What is shown, computed from the log."""
    of_blocks: bool = False
    """Whether it is about blocks, which a dense run has none of."""

    def reason_missing(self, run: Run) -> str | None:
        """Why the figure cannot be drawn, or None."""
        reason = self.missing(run)
        if reason and self.of_blocks and is_dense(run):
            return "this is a dense run: it has no blocks and no experts."
        return reason


def drawn(kind: FigureKind, run: Run, narrow: bool) -> Figure:
    """The figure in the report's look."""
    with matplotlib.rc_context(STYLE):
        return kind.draw(run, narrow)


def png(kind: FigureKind, run: Run, narrow: bool) -> bytes:
    """The figure as a PNG file."""
    found = rendered(lambda: kind.draw(run, narrow))
    assert found is not None  # what has nothing to draw says so by `missing`
    return found


def rendered(draw: Callable[[], Figure | None]) -> bytes | None:
    """What a function draws, in the report's look, as a PNG file; None where it finds nothing to draw."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = draw()
        if figure is None:
            return None
        figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    return buffer.getvalue()
