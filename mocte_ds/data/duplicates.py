"""Groups of documents that share text: copies, and whatever has a run of 13 words in common (grams.py)."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mocte_ds.data.signatures import Signatures


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
    """Takes the signatures of a corpus' documents; memory: 16 bytes per hash that is looked at, 8 per document."""

    def __init__(self, halvings: int = 0) -> None:
        """Look at hashes below 2^(64 - halvings) only."""
        self._halvings = halvings
        self._places, self._hashes, self._owners = ([np.empty(0, dtype=kind)] for kind in (np.uint64, np.uint64, int))
        self._documents = 0

    def add(self, signatures: Signatures) -> None:
        """Take the next documents."""
        kept, count = signatures.kept(self._halvings), len(signatures.places)
        self._hashes.append(kept.hashes)
        self._owners.append(np.repeat(np.arange(self._documents, self._documents + count), kept.counts))
        self._places.append(kept.places)
        self._documents += count

    def places(self) -> np.ndarray:
        """(documents,) uint64 as given."""
        self._places = [np.concatenate(self._places)]
        return self._places[0]

    def links(self) -> Links:
        """All pairs; the finder holds no hashes after it."""
        hashes = np.concatenate(self._hashes)
        self._hashes = []
        owners = np.concatenate(self._owners)
        self._owners = []
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
