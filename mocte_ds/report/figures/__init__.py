"""The figures of a run's report, in the order in which the page shows them."""

from mocte_ds.report.figures import (
    clocks,
    clusters,
    domains,
    flops,
    load,
    loss,
    optimizer,
    projection,
    spectrum,
    trainability,
)
from mocte_ds.report.figures.drawing import FigureKind, drawn, png

ALL: dict[str, FigureKind] = {
    module.FIGURE.name: module.FIGURE
    for module in (loss, clocks, spectrum, clusters, projection, domains, load, trainability, optimizer, flops)
}

__all__ = ["ALL", "FigureKind", "drawn", "png"]
