"""Random controls for clusters, with the same loads."""

import torch
from torch import Tensor

from mocte_ds.clusters.balance import BalancedClusters
from mocte_ds.clusters.prices import even_prices, scores

_EVEN, _SWEEPS = 0.01, 20

# Shapes: n points, r coordinates, E clusters, V token ids.


@torch.no_grad()
def random_clusters(points: Tensor, count: int, seed: int, directions: bool = False) -> BalancedClusters:
    """Clusters of equal mass around random centroids: :func:`balanced_kmeans` without the k-means.

    Args:
        points: (n, r).
        count: E.
        seed: of the centroids, which are normal with the mean and the spread of the points along each coordinate.
        directions: as of :func:`balanced_kmeans`; the centroids then have length one.
    """
    z, generator = points.detach().double().cpu(), torch.Generator().manual_seed(seed)
    centroids = torch.randn(count, z.shape[1], generator=generator, dtype=torch.float64) * z.std(0) + z.mean(0)
    if directions:
        z, centroids = (torch.nn.functional.normalize(t, dim=1) for t in (z, centroids))
    mass = torch.ones(len(z), dtype=torch.float64)
    start = torch.zeros(count, dtype=torch.float64)
    prices = even_prices(z, mass, centroids, start, directions, _EVEN, _SWEEPS)
    labels = scores(z, centroids, prices, directions).argmax(dim=1)
    return BalancedClusters(centroids.float(), prices.float(), labels, directions)


def shuffled_table(table: Tensor, entries: Tensor, count: int, seed: int, mass: Tensor | None = None) -> Tensor:
    """A random table with the loads of another table.

    The sampled entries are dealt out one after the other, the heaviest first, each to a cluster drawn in proportion to
    the load that it still lacks; entries that were not sampled keep what they have.

    Args:
        table: (V,) int64 cluster of each entry, a token id for instance; -1: none, and it stays so.
        entries: (n,) int64 entry of each sampled token; -1: unknown.
        count: E.
        seed: of the draw.
        mass: (n,) fp64 by which each sampled token counts; None: 1.

    Returns:
        (V,) int64.
    """
    generator, result = torch.Generator().manual_seed(seed), table.clone()
    known = (entries >= 0) & (table[entries] >= 0)
    each = torch.ones(len(entries), dtype=torch.float64) if mass is None else mass
    seen, where = entries[known].unique(return_inverse=True)
    weight = torch.zeros(len(seen), dtype=torch.float64).index_add_(0, where, each[known])
    missing = torch.bincount(table[seen], weights=weight, minlength=count)
    for place in weight.argsort(descending=True, stable=True).tolist():
        open_ = missing.clamp(min=0.0)
        odds = open_ if float(open_.sum()) > 0 else torch.ones_like(open_)
        cluster = int(torch.multinomial(odds, 1, generator=generator))
        result[seen[place]] = cluster
        missing[cluster] -= float(weight[place])
    return result
