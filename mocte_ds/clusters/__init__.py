"""Clusters in the features: whether there are any, groups of equal mass, and what a gate stores of them."""

from mocte_ds.clusters.balance import BalancedClusters, balanced_kmeans, even_directions
from mocte_ds.clusters.compare import agreement, stability
from mocte_ds.clusters.detect import PUBLISHED_POINTS, Detection, detect, published_line
from mocte_ds.clusters.documents import document_scores, random_scores, shuffled_scores
from mocte_ds.clusters.pairs import pair_tables, sampled_once
from mocte_ds.clusters.table import hash_table, linear_gate, subspace_without_mean, type_table

__all__ = [
    "PUBLISHED_POINTS",
    "BalancedClusters",
    "Detection",
    "agreement",
    "balanced_kmeans",
    "detect",
    "document_scores",
    "even_directions",
    "hash_table",
    "linear_gate",
    "pair_tables",
    "published_line",
    "random_scores",
    "sampled_once",
    "shuffled_scores",
    "stability",
    "subspace_without_mean",
    "type_table",
]
