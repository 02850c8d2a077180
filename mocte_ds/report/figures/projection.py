"""Figure: documents in the first two singular directions, coloured by cluster and, beside it, by domain."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.labels import label_clouds
from mocte_ds.report.figures.layout import sheet
from mocte_ds.report.figures.palette import category_color, category_marker
from mocte_ds.report.run import Row, Run
from mocte_ds.report.wording import integer, plural, spread

Cloud = tuple[np.ndarray, str, str]
"""Points (n, 2), the name of what they share, its colour."""


def projections(run: Run) -> dict[int, Row]:
    """The last projection of every block that has points with all their clusters and domains."""
    found = {event["block"]: event for event in run.of_kind("projection") if _is_whole(event)}
    return dict(sorted(found.items()))


def _is_whole(event: Row) -> bool:
    points, clusters, domains = (event.get(name) or [] for name in ("points", "cluster", "domain"))
    numbered = all(isinstance(number, int) for number in clusters)
    return 0 < len(points) == len(clusters) == len(domains) and numbered


def missing(run: Run) -> str | None:
    return None if projections(run) else "documents are projected at emergence and at the end; neither has come yet."


def draw(run: Run, narrow: bool) -> Figure:
    found = projections(run)
    sizes = [len(event["points"]) for event in found.values()]
    most = max(len(set(event["domain"])) for event in found.values())
    height = max(2.3 if narrow else 3.0, 0.8 + 0.15 * most)
    figure = sheet(
        narrow, (2 * height if narrow else height) * len(found) + 0.2, f"n = {spread(sizes)} documents per block"
    )
    grid = figure.subplots(2 * len(found), 1) if narrow else figure.subplots(len(found), 2, squeeze=False)
    names = []
    for (by_cluster, by_domain), (block, event) in zip(np.reshape(grid, (-1, 2)), found.items(), strict=True):
        clusters = [f"cluster {number}" for number in event["cluster"]]
        points = np.array(event["points"], dtype=float)
        # Those that have points, never all up to the largest number: a damaged log may have any there.
        order = {f"cluster {number}": number for number in sorted(set(event["cluster"])) if number >= 0}
        names.append((by_cluster, _scatter(by_cluster, points, clusters, order)))
        order = {name: number for number, name in enumerate(run.domains)}
        names.append((by_domain, _scatter(by_domain, points, event["domain"], order)))
        by_cluster.set_title(f"{run.blocks[block]}, by cluster")
        by_domain.set_title(f"{run.blocks[block]}, by domain")
        for axis in (by_cluster, by_domain):
            axis.set_xlabel("first direction (feature units)")
            axis.set_ylabel("second direction\n(feature units)")
    label_clouds(names)
    return figure


def _scatter(axis: Axes, points: np.ndarray, category: Sequence[str], order: Mapping[str, int]) -> list[Cloud]:
    """Draw points by category, with a legend right of them; each category that has points as a cloud.

    Args:
        axis: to draw on.
        points: (n, 2).
        category: of each point.
        order: of the categories in the legend, with the number that each is coloured by.
    """
    clouds = []
    of = np.array(category)
    for name, index in order.items():
        mine = points[of == name]
        if len(mine):
            color, marker = category_color(index), category_marker(index)
            label = f"{name} ({len(mine)})"
            axis.scatter(mine[:, 0], mine[:, 1], s=13, color=color, marker=marker, alpha=0.6, lw=0, label=label)
            clouds.append((mine, name.removeprefix("cluster "), color))
    axis.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5, handletextpad=0.1, borderaxespad=0.2
    )
    return clouds


def caption(run: Run) -> str:
    found = projections(run)
    events = list(found.values())
    tokens = [event["tokens"] for event in events]
    when = f"after {integer(max(tokens))} tokens" if len(set(tokens)) == 1 else f"after {spread(tokens)} tokens"
    domains = max(len(set(event["domain"])) for event in events)
    return (
        "A point is the mean feature of one document, centred, in the first two singular directions of all documents, "
        f"{when}. Both panels of a block show the same points: once by cluster, as many as experts and of about the "
        f"same size, once by the documents' source ({plural(domains, 'domain')}). In brackets: documents."
    )


FIGURE = FigureKind(
    name="projection",
    title="Documents in the first two singular directions",
    reading="Where both panels have the same borders, clusters that were found without labels follow the documents' "
    "sources; clusters that look mixed here may still be apart in the other directions.",
    missing=missing,
    draw=draw,
    caption=caption,
    of_blocks=True,
)
