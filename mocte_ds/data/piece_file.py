"""Tokens and signatures of some documents in one file, with a checksum of each array."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocte_ds.data.encode import Encoded
from mocte_ds.data.signatures import Signatures
from mocte_ds.errors import DataError


@dataclass(frozen=True)
class Piece:
    """Some documents of a unit as they are stored."""

    encoded: Encoded
    by_file: np.ndarray
    """(files of the unit,) int64 documents."""

    def write(self, path: Path) -> None:
        """Store it in one file."""
        signatures = self.encoded.signatures
        np.savez(
            path,
            tokens=self.encoded.tokens,
            lengths=self.encoded.lengths,
            places=signatures.places,
            counts=signatures.counts,
            hashes=signatures.hashes,
            levels=signatures.levels,
            by_file=self.by_file,
        )


def read_signatures(path: Path) -> Signatures:
    """Signatures of a piece.

    Raises:
        DataError: see :func:`read_arrays`.
    """
    return Signatures(*read_arrays(path, "places", "counts", "hashes", "levels"))


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a piece.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with np.load(path) as stored:
            return [stored[name] for name in names]
    except Exception as error:  # zipfile, zlib and numpy
        raise DataError(
            f"{path} is missing or damaged ({error}); remove it and start its shard again: the rest is not made again."
        ) from error
