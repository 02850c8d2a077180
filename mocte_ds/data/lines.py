"""Lines of a plain, gzip or zstd file as bytes; memory stays small whatever the file expands to."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

MAX_BYTES = 64 << 20
"""Longest line, and so the longest document."""
_BLOCK = 1 << 20
# Bytes of blank lines in a row after which a file is taken for one that only expands.
_MAX_BLANK = 1 << 30


class TooLong(Exception):
    """A line that no machine should hold."""

    def __init__(self, what: str, line: int) -> None:
        """Keep ``what`` it is, and its number from 1."""
        super().__init__(what)
        self.line = line


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, and their numbers from 1.

    Lines end with LF or CR LF; in a file without any LF in its first MiB, with CR. A CR elsewhere is part of the line.

    Raises:
        TooLong: a line of more than 64 MiB, or a GiB of blank lines.
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    with _opened(path) as file:
        head = file.read(_BLOCK + 1)  # with the LF of a CR at the end of the first MiB
    bare = b"\r" in head[:_BLOCK] and b"\n" not in head
    with _opened(path) as file:
        stream = io.BufferedReader(_LineFeeds(file), _BLOCK) if bare else file
        number, blank = 0, 0
        while line := stream.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                raise TooLong(f"a line of more than {MAX_BYTES >> 20} MiB", number)
            blank = 0 if line.strip() else blank + len(line)
            if blank > _MAX_BLANK:
                raise TooLong(f"{_MAX_BLANK >> 30} GiB of blank lines before it", number)
            line = line.removesuffix(b"\n")
            yield number, line.removesuffix(b"\r")


def _opened(path: Path) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(cast(Any, gzip.open(path)), _BLOCK)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _BLOCK)
    return cast(io.BufferedReader, open(path, "rb", _BLOCK))


class _LineFeeds(io.RawIOBase):
    """A stream with LF for every CR."""

    def __init__(self, file: BinaryIO | io.BufferedReader) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        block = self._file.read(len(view)).replace(b"\r", b"\n")
        view[: len(block)] = block
        return len(block)
