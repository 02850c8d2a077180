"""Groups of documents that share text: copies, and whatever has a run of 13 words in common (grams.py)."""

from array import array
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mocte_ds.data.grams import gram_hashes

MAX_HASHES = 64_000_000
"""Hashes that are held: 16 bytes each, and as much again twice while they are sorted."""


@dataclass(frozen=True)
class Links:
    """Pairs of documents that belong together."""

    documents: int
    first: np.ndarray
    """(n,) int64 document."""
    second: np.ndarray
    """(n,) int64 a later document."""
    spread: np.ndarray
    """(n,) int64 how many documents have the text that they share; 0: the two are copies."""
    kept_share: float
    """Share of the hashes that were looked at. Two documents with n runs of 13 words in common are missed with a
    probability of (1 - kept_share)^n."""

    def groups(self, use: np.ndarray) -> np.ndarray:
        """(documents,) number of each document's group, by the chosen links: (n,) bool."""
        edges = coo_matrix(
            (np.ones(int(use.sum()), dtype=np.int8), (self.first[use], self.second[use])),
            shape=(self.documents, self.documents),
        )
        return connected_components(edges, directed=False)[1]


class LinkFinder:
    """Takes the documents of a corpus one after the other; memory is bounded but for 8 bytes per document.

    All documents with the same hash are linked to the first of them (union-find does the rest). Where there are more
    hashes than :data:`MAX_HASHES`, only those below a limit are kept, and the limit is halved as often as needed: what
    is kept hangs on the text alone, so shared text keeps the same hashes in both documents (Broder, 1997).
    """

    def __init__(self) -> None:
        self._places = array("Q")
        self._hashes: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []
        self._held, self._halvings = 0, 0

    def add(self, text: str, place: int) -> None:
        """Take the next document; ``place``: 64 bits of a hash of the whole text."""
        hashes = self._small(gram_hashes(text))
        self._hashes.append(hashes)
        self._owners.append(np.full(len(hashes), len(self._places)))
        self._places.append(place)
        self._held += len(hashes)
        if len(self._hashes) >= 4096:
            self._merge()
        while self._held > MAX_HASHES:
            self._halvings += 1
            self._merge()

    def places(self) -> np.ndarray:
        """(documents,) uint64 as given."""
        return np.asarray(self._places, dtype=np.uint64)

    def links(self) -> Links:
        """All pairs; the finder is empty after it."""
        self._merge()
        hashes, owners = self._hashes[0], self._owners[0]
        self._hashes, self._owners, self._held = [], [], 0
        found = [_shared(hashes, owners)]
        del hashes, owners
        places = self.places()
        first, second, _ = _shared(places, np.arange(len(places)))
        found.append((first, second, np.zeros_like(first)))
        pairs = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        return Links(len(places), pairs[0], pairs[1], pairs[2], 0.5**self._halvings)

    def _small(self, hashes: np.ndarray) -> np.ndarray:
        return hashes[hashes >> np.uint64(64 - self._halvings) == 0] if self._halvings else hashes

    def _merge(self) -> None:
        """One array of each, and only of the hashes that still count."""
        empty = np.empty(0, dtype=np.uint64)
        hashes, owners = np.concatenate([empty, *self._hashes]), np.concatenate([empty, *self._owners]).astype(np.int64)
        if self._halvings:
            small = hashes >> np.uint64(64 - self._halvings) == 0
            hashes, owners = hashes[small], owners[small]
        self._hashes, self._owners, self._held = [hashes], [owners], len(hashes)


def _shared(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every hash with several owners: the first owner, each other one, and how many there are."""
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = hashes[1:] != hashes[:-1]
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, len(hashes)))
    later = ~new
    repeat = np.maximum(counts - 1, 0)
    return np.repeat(owners[starts], repeat), owners[later], np.repeat(counts, repeat)
