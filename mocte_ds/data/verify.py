"""Hashes of prepared data in chunks, so that a flipped bit is found by a look at all of it or at a sample."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mocte_ds.errors import DataError

if TYPE_CHECKING:
    from mocte_ds.data.manifest import Manifest

Amount = Literal["auto", "all", "sample"]
"""How much of each file is looked at: `all`, a `sample` of some chunks, other ones every time, or `auto`: all of a file
of up to 256 MiB, else a sample."""
CHUNK = 16 << 20
"""Bytes that have a hash of their own."""
SAMPLE = 8
"""Chunks of a sample."""
_WHOLE = 256 << 20


def chunk_hashes(path: Path) -> list[str]:
    """Hash of each chunk of a file, 128 bits in hexadecimal."""
    with open(path, "rb") as file:
        return [_hash(part) for part in iter(lambda: file.read(CHUNK), b"")]


def token_type(vocab_size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """Type in which megatron-core stores token ids."""
    return np.uint16 if vocab_size < 65500 else np.int32


def require_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Refuse token ids that are not in the vocabulary.

    Raises:
        DataError: names the smallest or largest one.
    """
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(
            f"{where} has the token id {wrong}, outside of the vocabulary of {vocab_size}; prepare the data again with "
            "the tokenizer that belongs to it."
        )


def verify_prepared(folder: Path, manifest: "Manifest", amount: Amount = "auto", part: int = 0, parts: int = 1) -> None:
    """Compare all files of prepared data with the hashes in the manifest; see :func:`verify_file`.

    Raises:
        DataError: names the first file that differs, or is missing.
    """
    for name in sorted(manifest.files):
        verify_file(folder, manifest, name, amount, part, parts)


def verify_file(
    folder: Path, manifest: "Manifest", name: str, amount: Amount = "auto", part: int = 0, parts: int = 1
) -> None:
    """Compare a file with its hashes, and its token ids with the vocabulary.

    Args:
        folder: prepared data.
        manifest: of it.
        name: of the file, DOMAIN_SPLIT.bin or .idx.
        amount: see :data:`Amount`.
        part: which share of the work this process does, where several share it.
        parts: processes that share the work.

    Raises:
        DataError: it differs, is missing or cannot be read.
    """
    path, wanted = folder / name, manifest.files.get(name)
    if wanted is None:
        raise DataError(f"the manifest of {folder} has no hashes of {name}; prepare the data again.")
    try:
        size = path.stat().st_size
        if -(-size // CHUNK) != len(wanted):
            raise DataError(f"{path} has {size} bytes, its hashes are for {len(wanted)} x {CHUNK}; {_REMEDY}")
        with open(path, "rb") as file:
            for number in _chosen(len(wanted), size, amount, part, parts):
                file.seek(number * CHUNK)
                chunk = file.read(CHUNK)
                if _hash(chunk) != wanted[number]:
                    raise DataError(
                        f"{path} is damaged: bytes {number * CHUNK} to {number * CHUNK + len(chunk) - 1} are not those "
                        f"that were prepared; {_REMEDY}"
                    )
                if name.endswith(".bin"):
                    ids = np.frombuffer(chunk, dtype=token_type(manifest.vocab_size))
                    require_ids(ids, manifest.vocab_size, str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; prepare the data again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


_REMEDY = "remove that folder, or copy it again from where it is whole, and prepare the data again."


def _hash(chunk: bytes) -> str:
    return hashlib.blake2b(chunk, digest_size=16).hexdigest()


def _chosen(count: int, size: int, amount: Amount, part: int, parts: int) -> Iterator[int]:
    """Numbers of the chunks that this process looks at, ascending."""
    if amount == "all" or (amount == "auto" and size <= _WHOLE) or count <= SAMPLE:
        return iter(range(part, count, parts))
    own = max(1, SAMPLE // parts)
    return iter(sorted(np.random.default_rng().choice(count, size=own, replace=False).tolist()))
