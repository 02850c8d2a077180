"""Groups of points that an emptier region keeps apart, whatever density each of them has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

# Shapes: n points, k neighbours.


@dataclass(frozen=True)
class Neighbourhood:
    """What the density around each point is read from."""

    distances: np.ndarray
    """(n, n)."""
    nearest: np.ndarray
    """(n, k) ascending distances to the nearest points, the point itself first."""

    @classmethod
    def of(cls, distances: np.ndarray, neighbours: int) -> "Neighbourhood":
        """From distances (n, n); ``neighbours`` is k, at most n."""
        nearest = np.partition(distances, neighbours - 1, axis=1)[:, :neighbours]
        return cls(distances, np.sort(nearest, axis=1))

    @property
    def reach(self) -> np.ndarray:
        """(n,) distance to the k-th nearest point, counting the point itself: the smaller, the denser."""
        return self.nearest[:, -1]

    @cached_property
    def tree(self) -> np.ndarray:
        """(n - 1, 4) which points and groups join as a radius grows, in scipy's form.

        Two points are connected at the radius within which both have k neighbours and each other: DBSCAN's core points
        at every radius at once.
        """
        mutual = np.maximum(self.distances, np.maximum(self.reach[:, None], self.reach[None, :]))
        np.fill_diagonal(mutual, 0.0)
        return linkage(squareform(mutual, checks=False), "single")

    def widened(self, significance: float) -> float:
        """The factor by which a radius must grow to be larger by ``significance`` standard deviations.

        In a cloud of constant density and local dimension m the distance to the k-th neighbour varies from place to
        place by 1 / (m sqrt(k)) of itself.
        """
        neighbours = self.nearest.shape[1]
        return math.exp(min(1.5, significance / (local_dimension(self.nearest) * math.sqrt(neighbours))))

    def radius_of(self, points: list[int] | np.ndarray) -> float:
        """Median distance of some points to their k-th neighbour: the radius at which half of them connect."""
        return float(np.median(self.reach[points]))

    def counts(self, quantiles: Sequence[float], mass: np.ndarray, least: float) -> list[int]:
        """Groups of at least the least mass, at radii that are quantiles of the distance to the k-th neighbour."""
        found = []
        for quantile in quantiles:
            radius = float(np.quantile(self.reach, quantile))
            core = self.reach <= radius
            groups = np.bincount(fcluster(self.tree, radius, "distance")[core], weights=mass[core])
            found.append(int((groups >= least).sum()))
        return found


@dataclass
class _Group:
    """A connected set of points at one radius."""

    points: list[int]
    mass: float
    parts: list["_Group"] = field(default_factory=list)
    """The clusters that it consists of, if there are several."""


def separate_groups(near: Neighbourhood, mass: np.ndarray, least: float, significance: float) -> np.ndarray:
    """DBSCAN at all radii at once: groups that stay apart until the radius is far larger than their own.

    Where two groups of the least mass meet they are two clusters if, for both, the radius is larger than the median
    distance of their points to the k-th neighbour, by ``significance`` standard deviations; else they are one. This is
    the persistence of density's peaks (Chazal et al., "Persistence-based clustering", 2013), but measured from the bulk
    of each group and not from its densest point, so that the ends of a curve are not clusters.

    Args:
        near: of the points.
        mass: (n,) of each point.
        least: least mass of a cluster.
        significance: see :meth:`Neighbourhood.widened`.

    Returns:
        (n,) int64 group of each point, -1: none.
    """
    wider, groups = near.widened(significance), {i: _Group([i], float(m)) for i, m in enumerate(mass)}
    count = len(groups)
    for step, (a, b, radius, _) in enumerate(near.tree):
        one, other = groups.pop(int(a)), groups.pop(int(b))
        if one.mass < other.mass:
            one, other = other, one
        joined = groups[count + step] = _Group([], one.mass + other.mass)
        if other.mass >= least and all(g.parts or near.radius_of(g.points) * wider <= radius for g in (one, other)):
            joined.parts = [part for group in (one, other) for part in (group.parts or [group])]
        elif one.parts or other.parts:
            joined.parts = one.parts or other.parts  # what comes to several clusters together belongs to none of them
        else:
            one.points.extend(other.points)
            joined.points = one.points
    (root,) = groups.values()
    labels = np.full(count, -1)
    for number, part in enumerate(root.parts or [root]):
        labels[part.points] = number
    return labels


def join_groups(near: Neighbourhood, labels: np.ndarray, significance: float) -> np.ndarray:
    """Groups that another method has made, joined where no emptier region keeps them apart.

    Args:
        near: of the points.
        labels: (n,) group of each point, -1: none.
        significance: see :meth:`Neighbourhood.widened`.

    Returns:
        (n,) as ``labels``.
    """
    wider, names = near.widened(significance), range(labels.max(initial=-1) + 1)
    joined = {name: name for name in names}
    for name in names:
        members = labels == name
        connected = fcluster(near.tree, near.radius_of(np.flatnonzero(members)) * wider, "distance")
        home = np.bincount(connected[members]).argmax()
        for other in names:
            if (connected[labels == other] == home).mean() > 0.5:
                old, new = joined[other], joined[name]
                joined = {key: new if value == old else value for key, value in joined.items()}
    return np.array([joined.get(name, -1) for name in labels.tolist()], dtype=np.int64)


def local_dimension(nearest: np.ndarray) -> float:
    """Dimension in which the points fill space around them (Levina & Bickel, 2004, averaged as MacKay proposed).

    Args:
        nearest: (n, k) ascending distances to the nearest points, the point itself first.
    """
    inner, outer = nearest[:, 1:-1], nearest[:, -1:]
    usable = (inner > 0).all(axis=1)
    if not usable.any():
        return 1.0
    inverse = np.log(outer[usable] / inner[usable]).mean()
    neighbours = nearest.shape[1] - 1
    return float(max(1.0, (neighbours - 2) / (neighbours - 1) / max(inverse, 1e-12)))
