"""How a corpus is cut into units and pieces, and which shard makes which: every host finds the same."""

import hashlib
import heapq
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mocte_ds.data.corpus import corpus_files, listed
from mocte_ds.data.documents import DocumentFile
from mocte_ds.errors import DataError

PIECE_BYTES = 64 << 20
"""Of text, before a piece ends: what is kept when the work is interrupted."""
WHOLE_BYTES = 256 << 20
"""Of a file on the disk: a larger one is read by all shards, and each makes its share of the pieces."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus."""

    domain: str
    name: str
    """Relative to the corpus."""
    bytes: int


@dataclass(frozen=True)
class Unit:
    """Files of one domain that are read in one go: one large file, or several small ones."""

    files: tuple[SourceFile, ...]
    owner: int | None
    """Number of the shard that makes it, from 0; None: its pieces are dealt out."""

    def belongs_to(self, piece: int, shard: int, of: int) -> bool:
        """Whether a shard, counted from 0, makes a piece."""
        return piece % of == shard if self.owner is None else self.owner == shard


@dataclass
class Corpus:
    """The files of a corpus by domain."""

    folder: Path
    files: list[SourceFile] = field(default_factory=list)

    @classmethod
    def look(cls, folder: str | Path) -> "Corpus":
        """List the files; nothing is read yet. Warns of skipped entries.

        Raises:
            DataError: see :func:`mocte_ds.data.corpus.corpus_files`.
        """
        folder, found = Path(folder), corpus_files(folder)
        if found.skipped:
            warnings.warn(f"not read of the corpus {folder}: {listed(found.skipped)}", stacklevel=3)
        corpus = cls(folder)
        for domain, paths in found.domains.items():
            for path in paths:
                corpus.files.append(SourceFile(domain, path.relative_to(folder).as_posix(), _stat(path).st_size))
        return corpus

    def units(self, of: int) -> list[Unit]:
        """All units in order, with owners that get about equal amounts.

        Args:
            of: number of shards.
        """
        groups: list[list[SourceFile]] = []
        room, domain = 0, None
        for file in self.files:
            if file.domain != domain or file.bytes > room:
                groups.append([])
                room, domain = PIECE_BYTES, file.domain
            groups[-1].append(file)
            room -= file.bytes
        sizes = [sum(file.bytes for file in group) for group in groups]
        owners: list[int | None] = [None] * len(groups)
        loads = [(0, shard) for shard in range(of)]
        for number in sorted(range(len(groups)), key=lambda number: (-sizes[number], number)):
            if sizes[number] <= WHOLE_BYTES:
                load, owner = heapq.heappop(loads)
                owners[number] = owner
                heapq.heappush(loads, (load + sizes[number], owner))
        return [Unit(tuple(group), owner) for group, owner in zip(groups, owners, strict=True)]


class UnitReader:
    """Reads chosen pieces of a unit, and makes sure that its files stay what they were when they were hashed."""

    def __init__(self, unit: Unit, folder: Path) -> None:
        """Hash the files.

        Raises:
            DataError: one cannot be read, or has another size than it had.
        """
        self.paths = [folder / file.name for file in unit.files]
        self._stats = [_stat(path) for path in self.paths]
        self.hashes = [hash_of_file(path) for path in self.paths]
        for path, file, found in zip(self.paths, unit.files, self._stats, strict=True):
            if found.st_size != file.bytes:
                raise _changed(path)
        self.pieces = 0
        """Of the unit; known when all is read."""

    def texts(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, str]]:
        """Piece, number of the file in the unit, and text of every document with text, in order.

        Args:
            wanted: whether a piece is parsed; the others are passed over.
        """
        piece, size, want = 0, 0, wanted(0)
        for number, path in enumerate(self.paths):
            for entry, text in DocumentFile(path).chosen(lambda _size: want):  # noqa: B023
                if text is not None and text.strip():
                    yield piece, number, text
                size += entry
                if size >= PIECE_BYTES:
                    piece, size = piece + 1, 0
                    want = wanted(piece)
        self.pieces = piece + 1
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Refuse files that were changed since they were hashed.

        Raises:
            DataError: names the file.
        """
        for path, stat in zip(self.paths, self._stats, strict=True):
            now = _stat(path)
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (stat.st_size, stat.st_mtime_ns, stat.st_ino):
                raise _changed(path)


def hash_of_file(path: Path) -> str:
    """sha256 of a file as it lies on the disk.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def hashes_of_domains(files: Iterable[SourceFile], hash_of: Callable[[str], str]) -> dict[str, str]:
    """Hash of each domain: that of its only file, or of the hashes of its files.

    Args:
        files: of the corpus, in its order.
        hash_of: gives the hash of the file of a name.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(file.domain, []).append(hash_of(file.name))
    return {
        domain: hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        for domain, hashes in found.items()
    }


def _changed(path: Path) -> DataError:
    return DataError(f"{path} was changed while it was read; prepare the data again.")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
