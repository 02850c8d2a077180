"""From clusters to a table of hashed pairs of tokens, and one of single tokens for pairs that were not sampled."""

import torch
from torch import Tensor

from mocte_ds.clusters.balance import balanced_kmeans
from mocte_ds.clusters.table import hash_table

# Shapes: n sampled tokens, r directions, E clusters, R rows of hashed pairs, V token ids.


def pair_tables(
    token_ids: Tensor,
    pairs: Tensor,
    coordinates: Tensor,
    vocab_size: int,
    rows: int,
    count: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Clusters of the mean coordinates of each row of pairs and of each token id, both together.

    One clustering, so that an expert gets the pairs and the single tokens that are alike. A row counts with its tokens;
    an id counts with those of its tokens whose pair was sampled once, which estimates the share of its tokens whose
    pair will be new (Good, 1953, "The population frequencies of species"). So loads are even over pairs and ids.

    Args:
        token_ids: (n,) int64 ids of the sampled tokens.
        pairs: (n,) int64 row of each token and the one before it.
        coordinates: (n, r) their features in the leading directions.
        vocab_size: V.
        rows: R.
        count: E.
        seed: of the clusters and of the random choices.

    Returns:
        (V,) int64 cluster of each id, dealt out evenly where it was not sampled; (R,) int64 cluster of each row, -1
        where it was not sampled.
    """
    of_ids, of_pairs = hash_table(vocab_size, count, seed), torch.full((rows,), -1, dtype=torch.int64)
    seen_ids, id_place = token_ids.unique(return_inverse=True)
    seen_pairs, pair_place, pair_count = pairs.unique(return_inverse=True, return_counts=True)
    if len(seen_ids) + len(seen_pairs) < count:
        return of_ids, of_pairs
    new = torch.zeros(len(seen_ids), dtype=torch.float64).index_add_(0, id_place, sampled_once(pairs))
    points = torch.cat([_means(coordinates, pair_place), _means(coordinates, id_place)])
    labels = balanced_kmeans(points, count, seed, mass=torch.cat([pair_count.double(), new])).labels
    of_pairs[seen_pairs], of_ids[seen_ids] = labels.split([len(seen_pairs), len(seen_ids)])
    return of_ids, of_pairs


def sampled_once(pairs: Tensor) -> Tensor:
    """(n,) fp64: 1 for each token (n,) whose pair no other one has, and 0 for others."""
    _, place, count = pairs.unique(return_inverse=True, return_counts=True)
    return (count[place] == 1).double()


def _means(coordinates: Tensor, place: Tensor) -> Tensor:
    """(groups, r) mean of the coordinates (n, r) with each number of ``place`` (n,)."""
    groups = int(place.max()) + 1
    sums = torch.zeros(groups, coordinates.shape[1], dtype=torch.float64).index_add_(0, place, coordinates.double())
    return sums / torch.bincount(place, minlength=groups).double()[:, None]
