"""Writes token ids in megatron-core's indexed format, DOMAIN_SPLIT.bin and .idx; 4 bytes of memory per document."""

import struct
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

from mocte_ds.data.verify import token_type

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_CODES = {np.uint16: 8, np.int32: 4}
_BLOCK = 1 << 20


class TokenFile:
    """The two files of one data set, while they are written."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Begin them.

        Args:
            prefix: path without .bin and .idx.
            vocab_size: decides on the type of the ids.

        Raises:
            OSError: they cannot be written; so does everything else here.
        """
        self._prefix, self._type = prefix, token_type(vocab_size)
        self._lengths = array("i")
        self._file = open(f"{prefix}.bin", "wb")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Written so far."""
        return len(self._lengths)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Write the next documents: all ids, and (n,) int32 how many each has."""
        self._file.write(tokens.astype(self._type, copy=False).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(tokens)

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the index, if all went well."""
        try:
            self._file.close()
        except OSError:  # closing writes the rest, which fails again
            if kind is None:
                raise
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        lengths = np.asarray(self._lengths, dtype=np.int32)
        with open(f"{self._prefix}.idx", "wb") as file:
            file.write(_MAGIC + struct.pack("<QBQQ", _VERSION, _CODES[self._type], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            place = 0
            for at in range(0, len(lengths), _BLOCK):
                sizes = lengths[at : at + _BLOCK].astype(np.int64) * np.dtype(self._type).itemsize
                file.write((place + np.cumsum(sizes) - sizes).tobytes())
                place += int(sizes.sum())
            for at in range(0, len(lengths) + 1, _BLOCK):
                file.write(np.arange(at, min(at + _BLOCK, len(lengths) + 1), dtype=np.int64).tobytes())
