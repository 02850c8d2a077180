"""Where a document lies: tf-idf of its token ids, projected and of length one; and which experts a context asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocte_ds.clusters import balanced_kmeans
from mocte_ds.errors import CheckpointError, DataError

# Shapes: n documents, V token ids, r directions, E clusters, T tokens.

_KEYS = ("idf", "directions", "centres")


@dataclass(frozen=True)
class TermSpace:
    """Directions of tf-idf vectors, and the centres of the clusters in them.

    A vector's length is divided out at the end, so that a context is a sum over its tokens and a division.
    """

    idf: np.ndarray
    """(V,) weight of each id; 0 for the end of a document."""
    directions: np.ndarray
    """(V, r)."""
    centres: np.ndarray
    """(E, r) means of the clusters' documents."""

    def embed(self, counts: Any) -> np.ndarray:
        """(n, r) of length one; zeros where a document has no token that counts.

        Args:
            counts: (n, V) how often each id is there, a sparse matrix.
        """
        return _unit(counts.multiply(self.idf[None]) @ self.directions)

    def contexts(self, ids: np.ndarray, end_id: int) -> np.ndarray:
        """What is known at each token: the tokens of its document up to and with it.

        Args:
            ids: (T,) one sequence.
            end_id: token that ends a document.

        Returns:
            (T, r) of length one; zeros at the end of a document, after which another one begins.
        """
        sums = np.cumsum(self.idf[ids, None] * self.directions[ids], axis=0)
        ends = np.flatnonzero(ids == end_id)
        begun = np.searchsorted(ends, np.arange(len(ids)), side="right")  # ends up to and with each token
        before = np.concatenate([np.zeros_like(sums[:1]), sums[ends]])[begun]
        found = sums - before
        found[ends] = 0.0  # what is left of sums and differences would become a direction
        return _unit(found)

    def weights(self, contexts: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
        """Share of each expert: the softmax of -|context - centre|^2 / temperature over the nearest ``top_k``.

        Args:
            contexts: (T, r).
            temperature: infinite: equal shares of the nearest.
            top_k: experts of a token.

        Returns:
            (T, E), rows that add up to 1.
        """
        scores = 2 * contexts @ self.centres.T - np.square(self.centres).sum(1)
        order = np.argsort(-scores, axis=1, kind="stable")
        shares = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
        np.put_along_axis(shares, order[:, top_k:], 0.0, axis=1)
        return shares / shares.sum(1, keepdims=True)

    def write(self, path: Path) -> None:
        """Store in a file."""
        with open(path, "wb") as file:
            np.savez(file, **{key: getattr(self, key) for key in _KEYS})

    @classmethod
    def read(cls, path: Path) -> "TermSpace":
        """From a file.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                idf, directions, centres = (np.asarray(stored[key], dtype=np.float64) for key in _KEYS)
            if directions.shape != (len(idf), centres.shape[1]) or idf.ndim != 1 or centres.ndim != 2:
                raise ValueError("shapes that do not fit together")
        except Exception as error:  # numpy and zipfile raise many types for damaged files
            raise CheckpointError(
                f"{path} holds no clusters of documents ({error}); cluster the data again."
            ) from error
        return cls(idf, directions, centres)


def find_clusters(
    counts: Any, tokens: np.ndarray, clusters: int, rank: int, seed: int, end_id: int
) -> tuple[TermSpace, np.ndarray]:
    """Cut documents into clusters of equally many tokens.

    tf-idf and the truncated SVD are scikit-learn's; k-means is that of experts, and each document weighs as many points
    as it has tokens.

    Args:
        counts: (n, V) how often each id is in each document, a sparse matrix.
        tokens: (n,) of each document.
        clusters: E.
        rank: r.
        seed: of the SVD and of k-means.
        end_id: token that ends a document; it is in all of them and counts nowhere.

    Returns:
        The space, and (n,) the cluster of each document.

    Raises:
        DataError: fewer documents than clusters or directions, or fewer ids than directions.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    documents, ids = counts.shape
    if documents <= max(clusters, rank) or ids <= rank:
        raise DataError(
            f"{clusters} clusters in {rank} directions need more documents and ids than the {documents:,} and {ids:,} "
            "that there are; take fewer."
        )
    counting = np.ones(ids)
    counting[end_id] = 0.0
    transform = TfidfTransformer()
    svd = TruncatedSVD(rank, random_state=seed).fit(transform.fit_transform(counts.multiply(counting[None]).tocsr()))
    idf = np.asarray(transform.idf_, dtype=np.float64) * counting
    space = TermSpace(idf, svd.components_.T.astype(np.float64), np.zeros((clusters, rank)))
    points = space.embed(counts)
    found = balanced_kmeans(torch.from_numpy(points), clusters, seed, torch.from_numpy(tokens.astype(np.float64)))
    return TermSpace(space.idf, space.directions, found.centroids.double().numpy()), found.labels.numpy()


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-12)
