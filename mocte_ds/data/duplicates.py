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
    """Which documents have which text in common: each text with each of its n documents."""

    documents: int
    text: np.ndarray
    """(n,) int64 number of the text, ascending."""
    document: np.ndarray
    """(n,) int64."""
    spread: np.ndarray
    """(n,) int64 how many documents have the text; 0: they are copies of each other."""
    kept_share: float
    """Share of the hashes that were looked at. Two documents with n runs of 13 words in common are missed with a
    probability of (1 - kept_share)^n."""

    def groups(self, use: np.ndarray) -> np.ndarray:
        """(documents,) number of each document's group.

        Args:
            use: (n,) bool. All documents of a text that are used with it belong together, whichever comes first.
        """
        text, document = self.text[use], self.document[use]
        starts = np.flatnonzero(_is_first(text))
        first = np.repeat(document[starts], np.diff(np.append(starts, len(text))))
        edges = coo_matrix(
            (np.ones(len(text), dtype=np.int8), (first, document)), shape=(self.documents, self.documents)
        )
        return connected_components(edges, directed=False)[1]


class LinkFinder:
    """Takes the documents of a corpus one after the other; memory is bounded but for 8 bytes per document.

    Where there are more
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
        text, document, spread = _shared(hashes, owners)
        del hashes, owners
        places = self.places()
        copies, copy, _ = _shared(places, np.arange(len(places)))
        copies += text[-1] + 1 if len(text) else 0
        return Links(
            len(places),
            np.concatenate([text, copies]),
            np.concatenate([document, copy]),
            np.concatenate([spread, np.zeros_like(copy)]),
            0.5**self._halvings,
        )

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


def _is_first(values: np.ndarray) -> np.ndarray:
    """(n,) bool: where sorted values change."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _shared(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every hash with several owners: its number, each owner, and how many there are."""
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(_is_first(hashes))
    counts = np.diff(np.append(starts, len(hashes)))
    several = counts > 1
    counts_each = np.repeat(counts, counts)
    numbers = np.repeat(np.arange(int(several.sum()), dtype=np.int64), counts[several])
    return numbers, owners[counts_each > 1], counts_each[counts_each > 1]
