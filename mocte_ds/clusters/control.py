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


def shuffled_table(table: Tensor, token_ids: Tensor, count: int, seed: int) -> Tensor:
    """A random table with the loads of another table.

    The sampled ids are dealt out one after the other, the most frequent first, each to a cluster drawn in proportion to
    the load that it still lacks; ids that were not sampled keep their random clusters.

    Args:
        table: (V,) int64 cluster of each token id.
        token_ids: (n,) int64 ids of the sampled tokens.
        count: E.
        seed: of the draw.

    Returns:
        (V,) int64.
    """
    generator, result = torch.Generator().manual_seed(seed), table.clone()
    seen, mass = token_ids[token_ids >= 0].unique(return_counts=True)
    missing = torch.bincount(table[seen], weights=mass.double(), minlength=count)
    for place in mass.argsort(descending=True, stable=True).tolist():
        open_ = missing.clamp(min=0.0)
        odds = open_ if float(open_.sum()) > 0 else torch.ones_like(open_)
        cluster = int(torch.multinomial(odds, 1, generator=generator))
        result[seen[place]] = cluster
        missing[cluster] -= float(mass[place])
    return result
