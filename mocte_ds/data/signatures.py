"""What texts are compared by: a hash of each as a whole and hashes of its runs of words, kept in three arrays."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mocte_ds.data.grams import gram_hashes

MAX_HASHES = 64_000_000
"""Hashes that are compared: 16 bytes each, and as much again twice while they are sorted."""
LEVELS = 48
_LIMITS = np.uint64(1) << np.arange(63, 64 - LEVELS, -1, dtype=np.uint64)


@dataclass(frozen=True)
class Signatures:
    """Of n texts."""

    places: np.ndarray
    """(n,) uint64 from a hash of the whole text."""
    counts: np.ndarray
    """(n,) int32 hashes of each text in ``hashes``."""
    hashes: np.ndarray
    """(sum of ``counts``,) uint64 distinct hashes of runs of words of each text, ascending."""
    levels: np.ndarray
    """(LEVELS,) int64 how many of all hashes, also of those left out, are below 2^(64 - level)."""

    @classmethod
    def of(cls, texts: Iterable[str], halvings: int = 0) -> "Signatures":
        """Signatures of texts.

        Args:
            texts: some megabytes of them.
            halvings: only hashes below 2^(64 - halvings) are kept; what is kept hangs on the text alone, so that shared
                text keeps the same hashes in all of its documents (Broder, 1997).
        """
        places, kept, levels = [], [], np.zeros(LEVELS, dtype=np.int64)
        for text in texts:
            hashes = gram_hashes(text)
            levels += np.append(len(hashes), np.searchsorted(hashes, _LIMITS))
            places.append(_place(text))
            kept.append(_below(hashes, halvings))
        counts = np.asarray([len(hashes) for hashes in kept], dtype=np.int32)
        return cls(np.asarray(places, dtype=np.uint64), counts, _joined(kept, np.uint64), levels)

    @classmethod
    def joined(cls, parts: list["Signatures"]) -> "Signatures":
        """Those of all texts, in order."""
        return cls(
            _joined([part.places for part in parts], np.uint64),
            _joined([part.counts for part in parts], np.int32),
            _joined([part.hashes for part in parts], np.uint64),
            sum((part.levels for part in parts), np.zeros(LEVELS, dtype=np.int64)),
        )

    def kept(self, halvings: int) -> "Signatures":
        """With hashes below 2^(64 - halvings) only."""
        small = _is_below(self.hashes, halvings)
        before = np.concatenate([[0], np.cumsum(small)])
        ends = np.cumsum(self.counts, dtype=np.int64)
        counts = before[ends] - before[ends - self.counts]
        return Signatures(self.places, counts.astype(np.int32), self.hashes[small], self.levels)


def halvings_for(levels: np.ndarray) -> int:
    """How often the limit of hashes must be halved until no more than :data:`MAX_HASHES` are left.

    Args:
        levels: see :attr:`Signatures.levels`; of several parts their sum.
    """
    return int(np.argmax(levels <= MAX_HASHES))


def _place(text: str) -> int:
    """A number in [0, 2^64) from the text. Salted: corpora are often thinned out by a plain hash of the text."""
    return int.from_bytes(hashlib.sha256(b"mocte-ds validation\0" + text.encode("utf-8")).digest()[:8])


def _is_below(hashes: np.ndarray, halvings: int) -> np.ndarray:
    return hashes >> np.uint64(64 - halvings) == 0 if halvings else np.ones(len(hashes), dtype=bool)


def _below(hashes: np.ndarray, halvings: int) -> np.ndarray:
    return hashes[_is_below(hashes, halvings)] if halvings else hashes


def _joined(parts: list[np.ndarray], kind: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=kind), *parts])
