"""Clusters of equal mass: k-means whose boundaries are moved until every cluster gets the same number of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.clusters.prices import even_prices, scores
from mocte_ds.clusters.start import means, principal_pieces
from mocte_ds.errors import MocteError

_ITERATIONS, _SWEEPS, _STARTS = 30, 20, 3
# Loads that differ by less than this share of the mean count as equal.
_EVEN = 0.01
# Another start must be better by this share, or rounding would choose between two that found the same clusters.
_BETTER = 1e-3
# Scores (points times clusters) above which one start, fewer steps and fewer sweeps per step must do.
_LARGE = 1 << 17

# Shapes: n points, r coordinates, E clusters.


@dataclass(frozen=True)
class BalancedClusters:
    """Centroids, and a price for each that evens out the load."""

    centroids: Tensor
    """(E, r)."""
    prices: Tensor
    """(E,) added to the score of each cluster, or to its logarithm where only directions count."""
    labels: Tensor
    """(n,) int64 cluster of each point."""
    directions: bool
    """True: the score is the (priced) projection on the centroid, not the distance to it."""

    def assign(self, points: Tensor) -> Tensor:
        """(n,) int64 cluster of each point, by the rule that a gate uses."""
        return scores(points.to(self.centroids), self.centroids, self.prices, self.directions).argmax(dim=1)


@torch.no_grad()
def balanced_kmeans(
    points: Tensor, count: int, seed: int = 0, mass: Tensor | None = None, directions: bool = False
) -> BalancedClusters:
    """K-means under the constraint of equal mass.

    Each step assigns the points to E clusters of equal mass at the least cost and moves the centroids to the means. The
    cheapest assignment under the constraint is a nearest-centroid rule with one additive price per cluster (the dual
    variables of the transport problem; the boundaries are a power diagram, Aurenhammer et al., 1998), so that a linear
    gate with a bias routes tokens exactly so. With ``directions`` the score is c.z times a price: a linear gate without
    a bias.

    Clusters are numbered by the mean squared distance of their points from the mean of all. Turned, mirrored or
    permuted points get the same clusters, and points that are equal but for rounding all but the same: no order of rows
    and no sign enters, unless the points are symmetric themselves.
    Time is bounded by n and E: under some seconds for 4,096 points and 256 clusters.

    Args:
        points: (n, r) finite, any device; the work is done in fp64 on the CPU.
        count: E.
        seed: of the second and third start; the first one is cut along the points' principal directions.
        mass: (n,) weights of the points, not negative; None: 1 each.
        directions: cluster by direction, with centroids of length one.

    Returns:
        Clusters on the CPU, in fp32. Loads are even to 1 % where the points allow it; equal points stay together.

    Raises:
        MocteError: fewer points than clusters, points without coordinates, or points that are not finite.
    """
    z = torch.as_tensor(points).detach().double().cpu()
    if z.dim() != 2 or z.shape[0] < count:
        raise MocteError(
            f"{count} clusters need at least {count} points (n, r), not {tuple(z.shape)}; raise spectrum.rows or lower "
            "num_experts."
        )
    if z.shape[1] == 0:
        raise MocteError(
            f"{count} clusters need points with at least one coordinate, not {tuple(z.shape)}; give at least one "
            "direction (spectrum.rank)."
        )
    if not torch.isfinite(z).all():
        raise MocteError("points to cluster are NaN or infinite; the features have overflowed.")
    w = torch.ones(len(z), dtype=torch.float64) if mass is None else mass.detach().double().cpu()
    if directions:
        z = torch.nn.functional.normalize(z, dim=1)
    generator = torch.Generator().manual_seed(seed)
    large = len(z) * count > _LARGE
    best: _Start | None = None
    for number in range(1 if large else _STARTS):
        labels = principal_pieces(z, w, count, even=True, generator=generator if number else None)
        found = _from_start(z, w, labels, count, directions, large)
        if best is None or found.cost < (1 - _BETTER) * best.cost:
            best = found
    assert best is not None
    centre = (w[:, None] * z).sum(0) / w.sum().clamp(min=1e-300)
    # Not by centroids: those of two clusters of equal mass are equally far from the mean, and rounding would decide.
    spread = means((z - centre).square().sum(1, keepdim=True), w, best.labels, torch.zeros(count, 1, dtype=z.dtype))
    order = spread[:, 0].argsort(stable=True)
    labels = order.argsort()[best.labels]
    return BalancedClusters(best.centroids[order].float(), best.prices[order].float(), labels, directions)


def even_directions(clusters: BalancedClusters, points: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids of length one and what to add to 2 cos(point, centroid) so that all win as many points.

    Args:
        clusters: by direction.
        points: (n, r) of length one.

    Returns:
        (E, r) and (E,), on the CPU.
    """
    z = points.detach().double().cpu()
    centroids = torch.nn.functional.normalize(clusters.centroids.double(), dim=1)
    mass, none = torch.ones(len(z), dtype=torch.float64), torch.zeros(len(centroids), dtype=torch.float64)
    return centroids.float(), even_prices(z, mass, centroids, none, False, _EVEN, _SWEEPS).float()


@dataclass(frozen=True)
class _Start:
    cost: float
    centroids: Tensor
    prices: Tensor
    labels: Tensor


def _from_start(z: Tensor, w: Tensor, labels: Tensor, count: int, directions: bool, large: bool) -> _Start:
    """What one start comes to."""
    # Clusters without points, where fewer points than clusters differ, wait far away or at any point.
    centroids = _centroids(z, w, labels, z[torch.linspace(0, len(z) - 1, count).long()], directions)
    prices = torch.zeros(count, dtype=torch.float64)
    for _ in range(_ITERATIONS // 3 if large else _ITERATIONS):
        prices = even_prices(z, w, centroids, prices, directions, _EVEN, 2 if large else _SWEEPS)
        new = scores(z, centroids, prices, directions).argmax(dim=1)
        if torch.equal(new, labels):
            break
        labels = new
        centroids = _centroids(z, w, labels, centroids, directions)
    prices = even_prices(z, w, centroids, prices, directions, _EVEN, _SWEEPS)
    labels = scores(z, centroids, prices, directions).argmax(dim=1)
    return _Start(float((w * (z - centroids[labels]).square().sum(1)).sum()), centroids, prices, labels)


def _centroids(z: Tensor, w: Tensor, labels: Tensor, old: Tensor, directions: bool) -> Tensor:
    """Means of the labelled points, of length one where directions count; a cluster without points keeps its own."""
    found = means(z, w, labels, old)
    if directions:
        length = found.norm(dim=1, keepdim=True)
        found = torch.where(length > 1e-12, found / length.clamp(min=1e-12), old)
    return found
