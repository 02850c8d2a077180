"""Size and hash of files: what a file must be."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

_PIECE = 1 << 22  # bytes read at once


@dataclass(frozen=True)
class FileFacts:
    """What a file must be."""

    bytes: int
    sha256: str


def hash_file(path: Path, limit: int | None = None) -> FileFacts:
    """Size and hash of a file, read piece by piece.

    Args:
        path: the file.
        limit: bytes from the start to read; None: all of the file.

    Raises:
        OSError: it cannot be read.
    """
    digest, count = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE if limit is None else min(_PIECE, limit - count)):
            digest.update(piece)
            count += len(piece)
    return FileFacts(count, digest.hexdigest())
