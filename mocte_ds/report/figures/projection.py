"""Figure: documents in the first two singular directions, coloured by cluster and, beside it, by domain."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import sheet
from mocte_ds.report.figures.palette import category_color, category_marker, text_color
from mocte_ds.report.reader import Row, Run
from mocte_ds.report.wording import decimal, integer, plural


def projections(run: Run) -> dict[int, Row]:
    """The last projection of every block that has points."""
    return {event["block"]: event for event in run.of_kind("projection") if event.get("points")}


def missing(run: Run) -> str | None:
    return None if projections(run) else "documents are projected at emergence and at the end; neither has come yet."


def draw(run: Run, narrow: bool) -> Figure:
    found = projections(run)
    figure = sheet(narrow, (2.0 if narrow else 3.3) * len(found) + 0.2)
    grid = figure.subplots(len(found), 2, sharex="row", sharey="row", squeeze=False)
    for (by_cluster, by_domain), block in zip(grid, sorted(found), strict=True):
        event = found[block]
        points = np.array(event["points"], dtype=float)
        clusters = event.get("cluster") or [0] * len(points)
        domains = event.get("domain") or ["unknown"] * len(points)
        numbers = sorted(set(clusters))
        labels = {number: "noise" if number < 0 else str(number) for number in numbers}
        _scatter(by_cluster, points, clusters, numbers, [labels[number] for number in numbers])
        names = [name for name in run.domains if name in set(domains)]
        _scatter(by_domain, points, domains, names, names, first=[run.domains.index(name) for name in names])
        by_cluster.set_title(f"{run.blocks[block]}\nby cluster")
        by_domain.set_title("\nby domain")
        by_cluster.set_ylabel("second direction\n(feature units)")
        for axis in (by_cluster, by_domain):
            axis.set_xlabel("first direction (feature units)" if not narrow else "first direction")
    return figure


def _scatter(
    axis: Axes,
    points: np.ndarray,
    category: Sequence,
    values: Sequence,
    names: Sequence[str],
    first: Sequence[int] | None = None,
) -> None:
    """Points by category, each category named where its middle lies."""
    of = np.array([values.index(value) for value in category])
    for place in range(len(names)):
        mine = points[of == place]
        index = first[place] if first else place
        color, marker = category_color(index), category_marker(index)
        axis.scatter(mine[:, 0], mine[:, 1], s=11, color=color, marker=marker, alpha=0.55, linewidths=0)
    for place, name in enumerate(names):
        x, y = np.median(points[of == place], axis=0)
        color = text_color(category_color(first[place] if first else place))
        text = axis.text(x, y, name, color=color, fontsize=8, fontweight="bold", ha="center", va="center")
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def caption(run: Run) -> str:
    found, parts = projections(run), []
    for block in sorted(found):
        event = found[block]
        entries = [entry for tokens, entry in run.block_history(block) if tokens <= event["tokens"]]
        entry = entries[-1] if entries else {}
        counts = ""
        if entry.get("nmi") is not None and entry.get("purity") is not None:
            counts = f", NMI {decimal(entry['nmi'], 2)}, purity {decimal(entry['purity'], 2)}"
        domains = len(set(event.get("domain") or []))
        parts.append(
            f"{run.blocks[block]} after {integer(event['tokens'])} tokens: {plural(len(event['points']), 'document')}, "
            f"{plural(len(set(event.get('cluster') or [])), 'cluster')}, {plural(domains, 'domain')}{counts}"
        )
    return (
        "A point is the mean feature of one document, centred, in the first two singular directions of all documents. "
        f"Left and right show the same points. By block: {'; '.join(parts)}."
    )


FIGURE = FigureKind(
    name="projection",
    title="Documents in the first two singular directions",
    reading="Where left and right have the same borders, clusters that were found without labels follow the documents' "
    "sources; clusters that look mixed here may still be apart in the other directions.",
    missing=missing,
    draw=draw,
    caption=caption,
)
