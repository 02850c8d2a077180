"""Safetensors files that are written and read one tensor at a time, with an index where there are several."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mocte_ds.errors import CheckpointError
from mocte_ds.json_files import read_object
from mocte_ds.ownership.checksums import tensor_bytes
from mocte_ds.paths import is_file, is_file_name
from mocte_ds.shown import shown

SHARD_BYTES = 2_000_000_000
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A mapped file's pages count as used memory once they were read, until the mapping goes.
REMAP_BYTES = 1 << 24
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.numel * self.dtype.itemsize


def write_shards(
    folder: Path, entries: list[Entry], make: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors to as many files as they need; memory holds one tensor at a time.

    The format puts all places before the first tensor, so that shapes must be known in advance:
    https://huggingface.co/docs/safetensors.

    Args:
        folder: to write to.
        entries: in the order in which ``make`` is called within a file.
        make: a tensor of the promised shape and dtype by its name.
        shard_bytes: largest file; a larger tensor has one of its own.

    Raises:
        OSError: a file cannot be written.
        CheckpointError: ``make`` gave another shape or dtype.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Wider numbers first, so that each tensor begins at a multiple of its own width.
        _write(folder / name, sorted(shard, key=lambda entry: -entry.dtype.itemsize), make)
        weight_map.update({entry.name: name for entry in shard})
    if len(shards) > 1:
        sizes = {
            "total_size": sum(entry.nbytes for entry in entries),
            "total_parameters": sum(entry.numel for entry in entries),
        }
        index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, entries: list[Entry], make: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.nbytes],
        }
        place += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = make(entry.name)
            if tuple(tensor.shape) != entry.shape or tensor.dtype is not entry.dtype:
                raise CheckpointError(
                    f"{entry.name} is {tuple(tensor.shape)} {tensor.dtype}; {entry.shape} {entry.dtype} was expected."
                )
            file.write(tensor_bytes(tensor))


class Shards:
    """The tensors of a folder in Hugging Face format, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Look into every file and check that the index and the files say the same.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or the index names other tensors.
        """
        self.folder = folder
        self._open: tuple[str, Any] = ("", None)
        self._read_bytes = 0
        path, self.files = folder / INDEX_FILE, {}
        if path.is_file() and (folder / SINGLE_FILE).is_file():
            raise CheckpointError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}, two models or one twice; remove one of them."
            )
        if not path.is_file():
            self.files = dict.fromkeys(self._names(SINGLE_FILE), SINGLE_FILE)
            return
        wanted: dict[str, set[str]] = {}
        for name, file in self._weight_map(path).items():
            wanted.setdefault(file, set()).add(name)
        for file, names in wanted.items():
            different = names ^ self._names(file)
            if different:
                raise CheckpointError(f"{folder / file} and {INDEX_FILE} do not agree on {min(different)}.")
            self.files.update(dict.fromkeys(names, file))

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: there is none of this name, or its file is damaged.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        file = self.files[name]
        try:
            if self._open[0] != file or self._read_bytes > REMAP_BYTES:
                self._open = ("", None)
                self._open, self._read_bytes = (file, safe_open(self.folder / file, "pt")), 0
            tensor = self._open[1].get_tensor(name).clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}.") from error
        self._read_bytes += tensor.nbytes
        return tensor

    def outline(self, name: str) -> tuple[str, list[int]]:
        """Kind of numbers, as the format names it, and shape of a tensor; nothing of it is read.

        Raises:
            CheckpointError: its file is damaged.
        """
        file = self.files[name]
        try:
            if self._open[0] != file:
                self._open, self._read_bytes = (file, safe_open(self.folder / file, "pt")), 0
            found = self._open[1].get_slice(name)
            return found.get_dtype(), found.get_shape()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}.") from error

    def _weight_map(self, path: Path) -> dict[str, str]:
        """File of each tensor, as the index says."""
        found = read_object(path, CheckpointError).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{path} has no weight_map, the file of each tensor; it is damaged.")
        for file in found.values():
            if not isinstance(file, str) or not is_file_name(file):
                raise CheckpointError(f"{path} names {shown(file)}, which is not a file of the folder.")
        return found

    def _names(self, file: str) -> set[str]:
        if not is_file(self.folder / file):
            raise CheckpointError(f"{self.folder / file} is missing, or is not a file.")
        try:
            with safe_open(self.folder / file, "pt") as content:
                return set(content.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}.") from error
