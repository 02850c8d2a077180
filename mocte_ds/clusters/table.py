"""From clusters to what a gate stores: a linear map of the feature, or a table from token ids to experts."""

import torch
from torch import Tensor

from mocte_ds.clusters.balance import BalancedClusters, balanced_kmeans

# Shapes: d features, r directions, E clusters, V token ids.


def linear_gate(clusters: BalancedClusters, basis: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The gate that sends a feature h to the cluster that ``clusters.assign`` gives its coordinates.

    Distances: logits = 2 C V^T (h - mu) - |C|^2 + prices. Directions: logits = prices * C V^T h, without a bias, which
    needs V orthogonal to mu (:func:`subspace_without_mean`). Source: docs/method.md, section 4.

    Args:
        clusters: of coordinates in ``basis``.
        basis: (d, r) orthonormal.
        mean: (d,) of the features.

    Returns:
        weight (E, d) and bias (E,), fp32.
    """
    centroids, prices, v = clusters.centroids.double(), clusters.prices.double(), basis.double().cpu()
    if clusters.directions:
        weight = prices.exp()[:, None] * centroids @ v.T
        return weight.float(), torch.zeros(len(centroids))
    weight = 2 * centroids @ v.T
    bias = prices - centroids.square().sum(1) - weight @ mean.double().cpu()
    return weight.float(), bias.float()


def subspace_without_mean(basis: Tensor, mean: Tensor) -> Tensor:
    """The directions of ``basis`` that are orthogonal to the mean, so that V^T h = V^T (h - mu).

    Args:
        basis: (d, r) orthonormal.
        mean: (d,).

    Returns:
        (d, r) orthonormal; (d, r - 1) where the mean lies in the span.
    """
    v, mu = basis.double(), mean.double()
    length = mu.norm()
    if float(length) == 0.0:
        return basis
    unit = mu / length
    v = v - torch.outer(unit, unit @ v)
    left, values, _ = torch.linalg.svd(v.cpu(), full_matrices=False)
    return left[:, values > 1e-6].to(basis)


def type_table(token_ids: Tensor, coordinates: Tensor, vocab_size: int, count: int, seed: int) -> Tensor:
    """A fixed table token id -> cluster, from the mean coordinates of each token id that was sampled.

    Token ids that were not sampled are dealt out evenly by the seed; all clusters get the same number of sampled
    tokens as far as the most frequent ids allow.

    Args:
        token_ids: (n,) int64 ids of the sampled tokens.
        coordinates: (n, r) their features in the leading directions.
        vocab_size: V.
        count: E.
        seed: of the clusters and of the random choices.

    Returns:
        (V,) int64.
    """
    table = hash_table(vocab_size, count, seed)
    seen, place = token_ids.unique(return_inverse=True)
    if len(seen) < count:
        return table
    mass = torch.bincount(place, minlength=len(seen)).double()
    sums = torch.zeros(len(seen), coordinates.shape[1], dtype=torch.float64)
    means = sums.index_add_(0, place, coordinates.double()) / mass[:, None]
    table[seen] = balanced_kmeans(means, count, seed, mass=mass).labels
    return table


def hash_table(vocab_size: int, count: int, seed: int) -> Tensor:
    """A random table with the same number of token ids in every cluster (to one): the baseline for routing by clusters.

    Args:
        vocab_size: V.
        count: E.
        seed: another seed gives another table.

    Returns:
        (V,) int64.
    """
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    table = torch.empty(vocab_size, dtype=torch.int64)
    table[order] = torch.arange(vocab_size) % count
    return table
