"""A price for each cluster under which all of them win the same mass of points."""

import numpy as np
import torch
from torch import Tensor

# Shapes: n points, r coordinates, E clusters.


def scores(z: Tensor, centroids: Tensor, prices: Tensor, directions: bool) -> Tensor:
    """(n, E) scores; the largest of a row is the point's cluster."""
    if directions:
        return (z @ centroids.T) * prices.exp()
    return 2 * z @ centroids.T - centroids.square().sum(1) + prices


def even_prices(
    z: Tensor, w: Tensor, centroids: Tensor, prices: Tensor, directions: bool, tolerance: float, sweeps: int
) -> Tensor:
    """Prices under which every cluster wins the same mass, one cluster's price after the other.

    The dual of the transport problem by coordinates, as an auction does it (Bertsekas, 1988): each cluster in turn gets
    the price at which it wins its share against the best offer of the others.

    Args:
        z: (n, r) fp64.
        w: (n,) mass of each point.
        centroids: (E, r).
        prices: (E,) to begin with.
        directions: see :class:`mocte_ds.clusters.BalancedClusters`.
        tolerance: largest relative error of a load.
        sweeps: largest number of rounds over all clusters.

    Returns:
        (E,) fp64, of mean 0.
    """
    share = float(w.sum()) / len(centroids)
    offers = _Offers(scores(z, centroids, torch.zeros_like(prices), directions).numpy(), prices.numpy(), directions)
    mass, point = w.numpy(), float(w.max())
    # Of points of equal mass a cluster can have one more or one less than its share; heavy ones may never fit.
    allowed = max(tolerance * share, 0.999 * point if float(w.min()) == point else 0.0)
    for _ in range(sweeps):
        before = offers.prices.copy()
        for k in range(len(before)):
            offers.set_price(k, offers.winning_price(k, mass, share))
        load = np.bincount(offers.first, weights=mass, minlength=len(before))
        if np.abs(load - share).max() <= allowed or np.array_equal(offers.prices, before):
            break
    return torch.from_numpy(offers.prices - offers.prices.mean())


class _Offers:
    """Priced scores of all points, and the best two of each point, so that a change of one price costs little."""

    def __init__(self, raw: np.ndarray, prices: np.ndarray, directions: bool) -> None:
        self.raw, self.prices, self._directions = raw, prices.copy(), directions
        self._priced = raw * np.exp(prices) if directions else raw + prices
        n = len(raw)
        self.first = np.zeros(n, dtype=np.int64)
        """(n,) cluster that wins each point."""
        self._second, self._best, self._next = self.first.copy(), np.zeros(n), np.zeros(n)
        self._look_again(np.arange(n))

    def set_price(self, k: int, price: float) -> None:
        """Give cluster k a price."""
        self.prices[k] = price
        column = self.raw[:, k] * np.exp(price) if self._directions else self.raw[:, k] + price
        self._priced[:, k] = column
        self._look_again(np.flatnonzero((self.first == k) | (self._second == k) | (column >= self._next)))

    def winning_price(self, k: int, mass: np.ndarray, share: float) -> float:
        """The price at which cluster k wins ``share`` at the others' prices: half way between two points."""
        rival, own = np.where(self.first == k, self._next, self._best), self.raw[:, k]
        if self._directions:
            # Only in front of the centroid can a factor help; a rival on the far side of the point loses to anything.
            margin = np.log(np.maximum(rival, 1e-12) / np.maximum(own, 1e-12))
            margin[own <= 0] = np.inf
        else:
            margin = rival - own
        order = margin.argsort(kind="stable")
        ascending, finite = margin[order], int(np.isfinite(margin).sum())
        if finite == 0:
            return float(self.prices[k])
        last = int((mass[order].cumsum() <= share * (1 + 1e-9)).sum()) - 1
        last = min(max(last, 0), finite - 1)
        if last + 1 < finite:
            return float(ascending[last] + ascending[last + 1]) / 2
        return float(ascending[last] + 1e-6 + abs(ascending[last]) * 1e-6)

    def _look_again(self, rows: np.ndarray) -> None:
        offers, line = self._priced[rows], np.arange(len(rows))
        first = offers.argmax(axis=1)
        self.first[rows], self._best[rows] = first, offers[line, first]
        offers[line, first] = -np.inf
        second = offers.argmax(axis=1)
        self._second[rows], self._next[rows] = second, offers[line, second]
