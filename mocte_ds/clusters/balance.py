"""Clusters of equal mass: k-means whose boundaries are moved until every cluster gets the same number of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.errors import MocteError

_ITERATIONS, _SWEEPS, _RESTARTS = 30, 20, 3
# Loads that differ by less than this share of the mean count as equal.
_EVEN = 0.01

# Shapes: n points, r coordinates, E clusters.


@dataclass(frozen=True)
class BalancedClusters:
    """Centroids, and a price for each that evens out the load."""

    centroids: Tensor
    """(E, r)."""
    prices: Tensor
    """(E,) added to the score of each cluster; of its logarithm where only directions count."""
    labels: Tensor
    """(n,) int64 cluster of each point."""
    directions: bool
    """True: the score is the (priced) projection on the centroid, not the distance to it."""

    def assign(self, points: Tensor) -> Tensor:
        """(n,) int64 cluster of each point, by the rule that a gate uses."""
        return _scores(points.to(self.centroids), self.centroids, self.prices, self.directions).argmax(dim=1)


@torch.no_grad()
def balanced_kmeans(
    points: Tensor, count: int, seed: int, mass: Tensor | None = None, directions: bool = False
) -> BalancedClusters:
    """K-means under the constraint of equal mass.

    Each step assigns the points to E clusters of equal mass at the least cost and moves the centroids to the means. The
    cheapest assignment under the constraint is a nearest-centroid rule with one additive price a cluster (the dual
    variables of the transport problem; the boundaries are a power diagram, Aurenhammer et al., 1998), so that a linear
    gate with a bias routes tokens exactly so. With ``directions`` the score is c.z times a price: a linear gate without
    a bias.

    Args:
        points: (n, r) finite, any device; the work is done in fp64 on the CPU.
        count: E.
        seed: of the starts (k-means++, the best of three).
        mass: (n,) weights of the points, not negative; None: 1 each.
        directions: cluster by direction, with centroids of length one.

    Returns:
        Clusters on the CPU, in fp32. Loads are even to 1 % where the points allow it; equal points stay together.

    Raises:
        MocteError: fewer points than clusters, or points that are not finite.
    """
    z = torch.as_tensor(points).detach().double().cpu()
    if z.dim() != 2 or z.shape[0] < count:
        raise MocteError(
            f"{count} clusters need at least {count} points (n, r), not {tuple(z.shape)}; raise spectrum.rows or lower "
            "num_experts."
        )
    if not torch.isfinite(z).all():
        raise MocteError("points to cluster are NaN or infinite; the features have overflowed.")
    w = torch.ones(len(z), dtype=torch.float64) if mass is None else mass.detach().double().cpu()
    if directions:
        z = torch.nn.functional.normalize(z, dim=1)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for _ in range(_RESTARTS):
        cost, *found = _one_start(z, w, _plus_plus(z, w, count, generator), directions)
        if best is None or cost < best[0]:
            best = (cost, *found)
    _, centroids, prices, labels = best
    return BalancedClusters(centroids.float(), prices.float(), labels, directions)


def _one_start(z: Tensor, w: Tensor, centroids: Tensor, directions: bool) -> tuple[float, Tensor, Tensor, Tensor]:
    prices = torch.zeros(len(centroids), dtype=torch.float64)
    labels = None
    for _ in range(_ITERATIONS):
        prices = _even_prices(z, w, centroids, prices, directions)
        new = _scores(z, centroids, prices, directions).argmax(dim=1)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        centroids = _means(z, w, labels, centroids, directions)
    prices = _even_prices(z, w, centroids, prices, directions)
    labels = _scores(z, centroids, prices, directions).argmax(dim=1)
    cost = float((w * (z - centroids[labels]).square().sum(1)).sum())
    return cost, centroids, prices, labels


def _scores(z: Tensor, centroids: Tensor, prices: Tensor, directions: bool) -> Tensor:
    """(n, E) whose largest entry in a row is the point's cluster."""
    if directions:
        return (z @ centroids.T) * prices.exp()
    return 2 * z @ centroids.T - centroids.square().sum(1) + prices


def _even_prices(z: Tensor, w: Tensor, centroids: Tensor, prices: Tensor, directions: bool) -> Tensor:
    """Prices under which every cluster wins the same mass, one cluster's price after the other."""
    count, share = len(centroids), w.sum() / len(centroids)
    raw = _scores(z, centroids, torch.zeros_like(prices), directions)
    prices, before = prices.clone(), None
    point = float(w.max())
    # Of points of equal mass a cluster can have one more or one less than its share; heavy ones may never fit.
    allowed = max(_EVEN * float(share), 0.999 * point if float(w.min()) == point else 0.0)
    for _ in range(_SWEEPS):
        for k in range(count):
            prices[k] = _winning_price(raw, w, prices, k, float(share), directions)
        labels = _priced(raw, prices, directions).argmax(dim=1)
        load = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, w)
        if float((load - share).abs().max()) <= allowed or (before is not None and torch.equal(prices, before)):
            break
        before = prices.clone()
    return prices - prices.mean()


def _winning_price(raw: Tensor, w: Tensor, prices: Tensor, k: int, share: float, directions: bool) -> Tensor:
    """The price at which cluster k wins ``share``, the others' prices given: half way between two points."""
    others = _priced(raw, prices, directions)
    others[:, k] = -torch.inf
    rival = others.amax(dim=1)
    if directions:
        # Only in front of the centroid can a factor help; a rival behind the point loses to anything.
        margin = (rival.clamp(min=1e-12) / raw[:, k].clamp(min=1e-12)).log()
        margin[raw[:, k] <= 0] = torch.inf
    else:
        margin = rival - raw[:, k]
    ascending, order = margin.sort()
    won = w[order].cumsum(0)
    last = int((won <= share * (1 + 1e-9)).sum()) - 1
    finite = int(torch.isfinite(ascending).sum())
    if finite == 0:
        return prices[k]
    last = min(max(last, 0), finite - 1)
    if last + 1 < finite:
        return (ascending[last] + ascending[last + 1]) / 2
    return ascending[last] + 1e-6 + ascending[last].abs() * 1e-6


def _priced(raw: Tensor, prices: Tensor, directions: bool) -> Tensor:
    return raw * prices.exp() if directions else raw + prices


def _means(z: Tensor, w: Tensor, labels: Tensor, old: Tensor, directions: bool) -> Tensor:
    """Centroids of the labelled points; a cluster without points keeps its old one."""
    sums = torch.zeros_like(old).index_add_(0, labels, z * w[:, None])
    load = torch.zeros(len(old), dtype=torch.float64).index_add_(0, labels, w)
    means = torch.where(load[:, None] > 0, sums / load.clamp(min=1e-300)[:, None], old)
    if directions:
        length = means.norm(dim=1, keepdim=True)
        means = torch.where(length > 1e-12, means / length.clamp(min=1e-12), old)
    return means


def _plus_plus(z: Tensor, w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starting centroids far from each other (Arthur & Vassilvitskii, "k-means++", 2007)."""
    chosen = [int(torch.multinomial(w.clamp(min=1e-300), 1, generator=generator))]
    nearest = (z - z[chosen[0]]).square().sum(1)
    for _ in range(1, count):
        weights = nearest * w
        if not bool((weights > 0).any()):
            weights = w.clone()
            weights[chosen] = 0.0  # all points are equal: any other one will do
            weights = weights if bool((weights > 0).any()) else torch.ones_like(w)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (z - z[chosen[-1]]).square().sum(1))
    return z[chosen].clone()
