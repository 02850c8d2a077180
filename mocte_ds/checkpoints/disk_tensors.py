"""Tensors that stay on the disk: where their bytes lie in which file, so that large files need little memory."""

import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.checkpoints.files import Deferred, Hashed, HashedBeside
from mocte_ds.checkpoints.values import read_plain
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.facts import FileFacts

_BLOCK = 1 << 23  # bytes; few of them are in memory at once
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python 3.12 has its name


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    path: Path
    start: int
    bytes: int


@dataclass(frozen=True)
class DiskTensor:
    """A contiguous tensor that lies in files."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Its bytes, in this order; zeros follow where they are too few."""

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize

    def flat(self, first: int, last: int, size: int | None = None) -> "DiskTensor":
        """Elements from ``first`` up to ``last`` as a vector of ``size`` elements, zeros after them."""
        start, end, found, place = first * self.dtype.itemsize, last * self.dtype.itemsize, [], 0
        for piece in self.pieces:
            low, high = max(start, place), min(end, place + piece.bytes)
            if low < high:
                found.append(Piece(piece.path, piece.start + low - place, high - low))
            place += piece.bytes
        return DiskTensor(self.dtype, (last - first if size is None else size,), tuple(found))

    def read(self) -> Tensor:
        """The tensor, in memory.

        Raises:
            CheckpointError: a file has become shorter.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        memory, place = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), 0
        for piece in self.pieces:
            with open(piece.path, "rb", buffering=0) as file:
                file.seek(piece.start)
                end = place + piece.bytes
                while place < end:
                    count = file.readinto(memory[place:end])
                    if not count:
                        raise _shorter(piece.path)
                    place += count
        memory[place:] = bytes(len(memory) - place)
        return tensor

    def blocks(self) -> Iterator[bytes]:
        """Its bytes from the files, in pieces that fit into memory; zeros at its end are left out.

        Raises:
            CheckpointError: a file has become shorter.
        """
        for piece in self.pieces:
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                missing = piece.bytes
                while missing:
                    block = file.read(min(missing, _BLOCK))
                    if not block:
                        raise _shorter(piece.path)
                    yield block
                    missing -= len(block)


def join(parts: list[DiskTensor]) -> DiskTensor:
    """Vectors, one after the other, as one vector."""
    pieces = tuple(piece for part in parts for piece in part.pieces)
    return DiskTensor(parts[0].dtype, (sum(part.numel for part in parts),), pieces)


def read_disk_tensors(path: Path) -> Any:
    """The content of a file with a :class:`DiskTensor` in the place of each tensor; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing, damaged or holds more than plain values and contiguous tensors.
    """
    content, size = read_plain(path, device="meta"), path.stat().st_size
    if any(tensor.untyped_storage()._checkpoint_offset is None for tensor in _tensors(content)):
        from torch._subclasses.fake_tensor import FakeTensorMode  # before torch 2.10; takes a second to import

        with FakeTensorMode():
            content = read_plain(path)

    def place(tensor: Tensor) -> DiskTensor:
        # torch says where the bytes of a storage lie; files of before torch 1.6 have no such place.
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None or not tensor.is_contiguous():
            raise CheckpointError(f"{path} holds a tensor in another form than ours: it is not a file of a checkpoint.")
        start += tensor.storage_offset() * tensor.dtype.itemsize
        pieces = (Piece(path, start, tensor.numel() * tensor.dtype.itemsize),)
        if start + pieces[0].bytes > size:
            raise CheckpointError(f"{path} claims to hold a tensor of {pieces[0].bytes} bytes and has {size} in all.")
        return DiskTensor(tensor.dtype, tuple(tensor.shape), pieces)

    return mapped(content, Tensor, place)


def filled(content: Any) -> Any:
    """What :func:`read_disk_tensors` returned, with its tensors read; what was one tensor is one again.

    Raises:
        CheckpointError: a file has become shorter.
    """
    seen: dict[Any, Tensor] = {}

    def read(stored: DiskTensor) -> Tensor:
        key = _identity(stored)
        if key not in seen:
            seen[key] = stored.read()
        return seen[key]

    return mapped(content, DiskTensor, read)


class TensorFile(Deferred):
    """A file that is written tensor by tensor."""

    def __init__(self, content: Any) -> None:
        """Take plain values with :class:`DiskTensor` and tensors in them."""
        self.content = content

    @property
    def bytes(self) -> int:
        """About the size of the file."""
        rest = 0

        def count(_: Any) -> None:
            nonlocal rest
            rest += 1

        found = {_identity(leaf): leaf.nbytes for leaf in _tensors(self.content)}
        mapped(self.content, object, count)
        return sum(found.values()) + 256 * len(found) + 64 * rest

    def write(self, path: Path) -> FileFacts:
        """Write what torch.load reads.

        Raises:
            OSError, RuntimeError: it could not be written; the latter is what torch.save makes of a full disk.
            CheckpointError: a file that is read has become shorter.
        """
        seen: dict[Any, Tensor] = {}

        def blank(leaf: Any) -> Tensor:
            key = _identity(leaf)
            if key not in seen:
                seen[key] = _unused(leaf)
            return seen[key]

        blanks = mapped(self.content, DiskTensor | Tensor, blank)
        with open(path, "wb") as empty, torch.serialization.skip_data():
            torch.save(blanks, empty)
        places = [stored.pieces[0].start for stored in _tensors(read_disk_tensors(path))]
        leaves = {start: leaf for start, leaf in zip(places, _tensors(self.content), strict=True) if leaf.nbytes}
        with open(path, "r+b") as file, contextlib.closing(HashedBeside(file)) as hashed:
            for start in sorted(leaves):
                hashed.see(file.read(start - file.tell()))  # what torch has written in between
                _fill(hashed, leaves[start])
            hashed.see(file.read())
            return hashed.facts()


class FileCopy(Deferred):
    """A file that is taken over as it is."""

    def __init__(self, path: Path) -> None:
        """Name the file."""
        self.path = path

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.path.stat().st_size

    def write(self, path: Path) -> FileFacts:
        """Copy it.

        Raises:
            OSError: it could not be read or written.
        """
        with open(self.path, "rb") as source, open(path, "wb") as file:
            with contextlib.closing(HashedBeside(file)) as hashed:
                while block := source.read(_BLOCK):
                    hashed.write(block)
                return hashed.facts()


def mapped(value: Any, kind: Any, change: Callable[[Any], Any]) -> Any:
    """Plain values with each leaf of a kind changed."""
    if isinstance(value, Mapping):
        pairs = [(key, mapped(item, kind, change)) for key, item in value.items()]
        if not isinstance(value, OrderedDict):
            return dict(pairs)
        made = OrderedDict(pairs)
        vars(made).update(vars(value))  # the versions of a module's state dict
        return made
    if type(value) in (list, tuple):
        return type(value)(mapped(item, kind, change) for item in value)
    return change(value) if isinstance(value, kind) else value


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} has become shorter while it was read.")


def _identity(leaf: Any) -> Any:
    """Equal for what is one tensor: lies in the same place. Two that are all zeros are two."""
    return leaf if isinstance(leaf, DiskTensor) and leaf.pieces else id(leaf)


def _tensors(content: Any) -> Iterator[Any]:
    found: list[Any] = []
    mapped(content, DiskTensor | Tensor, found.append)
    return iter(found)


def _fill(file: Hashed, leaf: Any) -> None:
    """Write a tensor's bytes, zeros at its end included."""
    missing = leaf.nbytes
    if isinstance(leaf, Tensor):
        file.write(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return
    for block in leaf.blocks():
        file.write(block)
        missing -= len(block)
    while missing:
        zeros = bytes(min(missing, _BLOCK))
        file.write(zeros)
        missing -= len(zeros)


def _unused(leaf: Any) -> Tensor:
    """A tensor like another one, whose memory nobody touches, so that the system gives it none."""
    if not leaf.nbytes:
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    promised = mmap.mmap(-1, leaf.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return torch.frombuffer(promised, dtype=leaf.dtype).reshape(leaf.shape)
