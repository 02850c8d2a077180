"""What an export says of each of its tensors and files; whoever loads the folder later holds it against that."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocte_ds.errors import CheckpointError, MocteError, NotOurs
from mocte_ds.json_files import read_object
from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.marker import MARKER, Marker

if TYPE_CHECKING:  # takes seconds, and not everything that looks for owners needs it
    from torch import Tensor

CHECKSUMS_FILE = "checksums.json"
_LEFT_OUT = (CHECKSUMS_FILE, "README.md", "export.json")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_ADVICE = f"export the checkpoint again; if you changed it on purpose, remove {CHECKSUMS_FILE} and {MARKER}"
_SUM = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Checksums:
    """Of an exported folder."""

    folder: Path
    tensors: dict[str, str]
    """sha256 of each tensor, as of :func:`checksum`."""
    files: dict[str, str]
    """sha256 of each file beside the weights; empty in exports of version 0.1.0."""

    @classmethod
    def read(cls, folder: Path, kind: type[MocteError] = CheckpointError) -> "Checksums | None":
        """Those of a folder; None where there are none: others wrote it, or it was changed on purpose.

        Args:
            folder: only read.
            kind: of the error.

        Raises:
            MocteError: of the given kind: the list is damaged.
        """
        path = folder / CHECKSUMS_FILE
        _require_listed(path, kind)
        if not path.exists():
            return None
        values = read_object(path, kind)
        if not values.keys() <= {"tensors", "files"}:  # version 0.1.0 has the tensors alone
            values = {"tensors": values, "files": {}}
        tensors: Any = values.get("tensors")
        files: Any = values.get("files")
        for sums in (tensors, files):
            if not isinstance(sums, dict) or not all(isinstance(s, str) and _SUM.fullmatch(s) for s in sums.values()):
                raise kind(f"{path} is damaged: it is not a list of sha256 sums; {_ADVICE}.")
        if any(Path(name).name != name for name in files):
            raise kind(f"{path} is damaged: it names files outside of its folder; {_ADVICE}.")
        return cls(folder, tensors, files)

    def require_files(self, kind: type[MocteError] = CheckpointError, names: Collection[str] | None = None) -> None:
        """Refuse a folder whose config, tokenizer or code is not the exported one.

        Args:
            kind: of the error.
            names: files that are looked at; None: all.

        Raises:
            MocteError: of the given kind: names the file.
        """
        for name, wanted in self.files.items():
            if names is not None and name not in names:
                continue
            path = self.folder / name
            try:
                found = hash_file(path).sha256
            except OSError as error:
                raise kind(f"{path}, which the export wrote, cannot be read: {error.strerror or error}.") from error
            if found != wanted:
                raise kind(f"{path} is not what {CHECKSUMS_FILE} says; {_ADVICE}.")

    def require_tensors(self, names: Collection[str], read: Callable[[str], "Tensor"]) -> None:
        """Refuse a folder whose weights are not the exported ones.

        Args:
            names: of all tensors in its files.
            read: a tensor by its name.

        Raises:
            CheckpointError: names a tensor that is missing, too much, or changed.
        """
        if missing := self.tensors.keys() - set(names):
            raise CheckpointError(
                f"{self.folder} has no tensor {min(missing)} ({len(missing)} are missing), which {CHECKSUMS_FILE} "
                f"names; {_ADVICE}."
            )
        if extra := set(names) - self.tensors.keys():
            raise CheckpointError(f"{self.folder} holds {min(extra)}, which {CHECKSUMS_FILE} does not name; {_ADVICE}.")
        for name in names:
            if checksum(read(name)) != self.tensors[name]:
                raise CheckpointError(
                    f"{self.folder}: {name} is not what {CHECKSUMS_FILE} says: its file is damaged, or it was trained "
                    f"on since the export; {_ADVICE}."
                )


def _require_listed(path: Path, kind: type[MocteError]) -> None:
    """Refuse a list that is not the one which the folder's marker names: without it nothing would be looked at."""
    try:
        marker = Marker.read(path.parent)
        entry = marker.files.get(path.name) if marker else None
        if entry and (path.is_symlink() or hash_file(path) not in entry.versions):
            raise kind(f"{path} is not what the export wrote; {_ADVICE}.")
    except NotOurs as error:
        raise kind(f"{path.parent / MARKER} is damaged or was changed; {_ADVICE}.") from error
    except OSError as error:
        raise kind(f"{path}, which the export wrote, cannot be read: {error.strerror or error}; {_ADVICE}.") from error


def write_checksums(folder: Path, tensors: Mapping[str, str]) -> None:
    """Write the list of a finished export.

    Args:
        folder: with all its files.
        tensors: their sums.

    Raises:
        OSError: a file cannot be read or written.
    """
    paths = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    files = {p.name: hash_file(p).sha256 for p in paths if p.name not in _LEFT_OUT and not p.name.endswith(_WEIGHTS)}
    sums = {"tensors": dict(tensors), "files": files}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


class SumsBeside:
    """Hashes tensors in a thread, each while the next one is read or written; two are held at most."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        """Checksums by name, complete when the block ends."""
        self._thread = ThreadPoolExecutor(1, "sha256")
        self._last: tuple[str, Future[str] | None] = ("", None)

    def __enter__(self) -> "SumsBeside":
        return self

    def __exit__(self, *error: object) -> None:
        self._take()
        self._thread.shutdown()

    def add(self, name: str, tensor: "Tensor") -> None:
        """Hash a tensor that does not change any more."""
        self._take()
        self._last = (name, self._thread.submit(checksum, tensor))

    def _take(self) -> None:
        (name, last), self._last = self._last, ("", None)
        if last is not None:
            self.found[name] = last.result()


def checksum(tensor: "Tensor") -> str:
    """sha256 of a tensor's bytes, shape and dtype."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The numbers of a tensor in CPU memory, as a file holds them."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
