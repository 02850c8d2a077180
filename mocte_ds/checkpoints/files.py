"""Writing a checkpoint's files so that they outlast a power cut, and hashing them."""

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mocte_ds.ownership.durable import pending_name, sync_folder
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.ownership.put import put, require_ours


class Deferred:
    """A file's content that is made only while it is written."""

    @property
    def bytes(self) -> int:
        """About the size of the file."""
        raise NotImplementedError

    def write(self, path: Path) -> FileFacts:
        """Write the file; what it must be."""
        raise NotImplementedError


class Hashed:
    """A file that hashes what is written to it, so that nothing is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes, and hash them."""
        self.digest.update(data)
        self.count += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Hand everything to the system."""
        self.file.flush()

    def facts(self) -> FileFacts:
        """Size and hash of what was written."""
        return FileFacts(self.count, self.digest.hexdigest())


class HashedBeside(Hashed):
    """A :class:`Hashed` that hashes in a thread while the next block is read and written; at most two are held."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._thread = ThreadPoolExecutor(1, "sha256")
        self._last: Future[None] | None = None

    def write(self, data: Any) -> int:
        """Write a block that does not change any more."""
        self.see(data)
        return self.file.write(data)

    def see(self, data: Any) -> None:
        """Hash a block that lies in the file already."""
        self._wait()
        self.count += len(data)
        self._last = self._thread.submit(self.digest.update, data)

    def facts(self) -> FileFacts:
        """Size and hash of what was written, once all is hashed."""
        self._wait()
        return super().facts()

    def close(self) -> None:
        """End the thread; the file stays open."""
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


def write_file(path: Path, content: Any) -> FileFacts:
    """Write a file and see it onto the disk.

    Args:
        path: the file.
        content: bytes, a plain value for torch.save, or what writes the file by itself.

    Raises:
        OSError, RuntimeError: it could not be written; the latter is what torch.save makes of a full disk.
    """
    if isinstance(content, Deferred):
        facts = content.write(path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return facts
    with open(path, "wb") as file:
        hashed = Hashed(file)
        if isinstance(content, bytes):
            hashed.write(content)
        else:
            torch.save(content, hashed)
        file.flush()
        os.fsync(file.fileno())
    return hashed.facts()


def replace_file(path: Path, content: Any) -> FileFacts:
    """:func:`write_file` in one move: readers see the old file or the new one, and a failed write leaves nothing.

    Raises:
        OSError, RuntimeError: it could not be written.
    """
    pending = pending_name(path)
    try:
        facts = write_file(pending, content)
        os.replace(pending, path)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return facts


def put_file(path: Path, content: Any, by: str) -> None:
    """:func:`replace_file` where a file of the user may lie: only one that ``by`` has written is replaced.

    Args:
        path: the file; its folder gets a marker that lists it.
        content: as of :func:`write_file`.
        by: who writes.

    Raises:
        NotOurs: something else lies there; nothing was changed.
        OSError, RuntimeError: it could not be written.
    """
    require_ours(path.parent, [path.name], by)
    pending = pending_name(path)
    try:
        facts = write_file(pending, content)
        put(path.parent, {path.name: pending}, by, known={path.name: facts})
    finally:
        pending.unlink(missing_ok=True)


def to_json(values: Any) -> bytes:
    """Values as the bytes of a JSON file."""
    return json.dumps(values, indent=1).encode()
