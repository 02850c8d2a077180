"""What may lie in a checkpoint's file: values that are read back without executing anything."""

import contextlib
import enum
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocte_ds.checkpoints.files import Deferred
from mocte_ds.errors import CheckpointError, MocteError, peer_is_lost
from mocte_ds.shown import one_line

_DEEPEST = 100  # containers within containers
_IMPLAUSIBLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What values of other types and sizes than expected lead to."""
_OBJECT, _FIELDS = "object of class", "fields"


def to_plain(value: Any, where: str, copy: bool = False, classes: Mapping[str, type] | None = None) -> Any:
    """A value as tensors, numbers, texts, lists, tuples and dicts, which torch.load(weights_only=True) reads.

    Enums and numpy's numbers become numbers and texts. Tensors that are views become tensors of their own, so that a
    file does not hold the whole of what they look at; a tensor that is met twice stays one.

    Args:
        value: nested containers.
        where: what the value is, for the message.
        copy: whether every tensor is copied to CPU memory, so that it may change afterwards.
        classes: further classes by name, whose attributes are stored.

    Raises:
        CheckpointError: names the place and the class of what only pickle could store.
    """
    names = {kind: name for name, kind in (classes or {}).items()}
    seen: dict[tuple, Tensor] = {}

    def convert(item: Any, place: str) -> Any:
        if isinstance(item, Tensor):
            return _tensor(item, copy, seen)
        if isinstance(item, enum.Enum):
            return convert(item.value, place)
        if isinstance(item, np.generic):
            return item.item()
        if item is None or type(item) in (bool, int, float, str, bytes, torch.dtype, torch.Size):
            return item
        if type(item) in names:
            return plain_object(names[type(item)], convert(vars(item), place))
        if isinstance(item, Mapping):
            pairs = [(convert(key, f"a key of {place}"), convert(v, f"{place}[{key!r}]")) for key, v in item.items()]
            if not isinstance(item, OrderedDict):
                return dict(pairs)
            ordered = OrderedDict(pairs)
            if vars(item):  # the versions of a module's state dict
                vars(ordered).update(convert(vars(item), place))
            return ordered
        if isinstance(item, list | tuple):
            items = [convert(entry, f"{place}[{number}]") for number, entry in enumerate(item)]
            return items if isinstance(item, list) else tuple(items)
        for kind in (str, int, float):
            if isinstance(item, kind):
                return kind(item)
        raise CheckpointError(
            f"{place} holds a {type(item).__module__}.{type(item).__qualname__}, which could only be read back by "
            "executing code; hand over numbers, texts, tensors, and lists and dicts of them. Nothing was written."
        )

    return convert(value, where)


def from_plain(value: Any, classes: Mapping[str, type]) -> Any:
    """What :func:`to_plain` was given; objects of other classes than ``classes`` stay dicts."""
    if isinstance(value, dict):
        if set(value) == {_OBJECT, _FIELDS} and value[_OBJECT] in classes and isinstance(value[_FIELDS], dict):
            made: Any = object.__new__(classes[value[_OBJECT]])
            vars(made).update(from_plain(value[_FIELDS], classes))
            return made
        for key in value:
            value[key] = from_plain(value[key], classes)
        return value
    if type(value) in (list, tuple):
        return type(value)(from_plain(item, classes) for item in value)
    return value


def plain_object(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What :func:`to_plain` makes of an object of the class ``name``."""
    return {_OBJECT: name, _FIELDS: fields}


def object_fields(value: Any) -> dict[str, Any]:
    """The attributes of what :func:`plain_object` made."""
    return value[_FIELDS]


def size_in_bytes(value: Any) -> int:
    """Bytes of a plain value's tensors, and about those of the rest."""
    if isinstance(value, Deferred):
        return value.bytes
    storages: dict[int, int] = {}
    rest = 0
    for item in _leaves(value):
        if isinstance(item, Tensor):
            storages[id(item)] = item.numel() * item.element_size()
        rest += len(item) if isinstance(item, bytes | str) else 16
    return sum(storages.values()) + rest


def read_plain(path: Path, mmap: bool = False, device: str = "cpu") -> Any:
    """Read a file without executing anything in it.

    Args:
        path: the file.
        mmap: whether tensors are read only when they are used.
        device: `cpu`, or `meta`: nothing is read of tensors.

    Returns:
        Its content.

    Raises:
        CheckpointError: the file is missing, damaged or holds more than plain values and tensors.
    """
    try:
        pickled = _pickled_bytes(path)
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        _require_tree(content, pickled)
        return content
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete or not one of mocte_ds.") from error
    except Exception as error:  # torch.load raises many types for a damaged file
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {one_line(error)}") from error


def require_keys(values: Any, keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    """``values``, if it is a dict with these keys.

    Raises:
        CheckpointError: it is not; names the file.
    """
    missing = [key for key in keys if key not in values] if isinstance(values, dict) else ["keys"]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}: it is not a file of a checkpoint of mocte_ds.")
    return values


@contextlib.contextmanager
def only_plausible(folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong with values that no save writes into a refusal; hashes do not guard against purpose.

    Args:
        folder: or file, whose content is looked at within.
        *kinds: of errors that come of such values beside the usual ones.

    Raises:
        CheckpointError: names it and what was met.
        RuntimeError: the echo of another rank's end, as it is.
    """
    try:
        yield
    except Exception as error:
        of_values = isinstance(error, (*_IMPLAUSIBLE, *kinds)) and not isinstance(error, MocteError)
        if not of_values or peer_is_lost(error):
            raise
        raise CheckpointError(
            f"{folder} holds values that no version of mocte_ds writes ({type(error).__name__}: {one_line(error)}): "
            "it was changed, or another program has written it."
        ) from error


def _pickled_bytes(path: Path) -> int:
    """Bytes of a file's values without its tensors; nothing in it may claim to be larger than the file is.

    Raises:
        ValueError, UnpicklingError: not a file that torch.save writes today.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise pickle.UnpicklingError("it is not a file that torch.save writes") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("it claims to hold more bytes than it has")
    return sum(entry.file_size for entry in entries if entry.filename.endswith("data.pkl"))


def _require_tree(content: Any, pickled: int) -> None:
    """Refuse containers that are nested deeply, or that hold each other so often that going through them never ends.

    Raises:
        ValueError: they do.
    """
    left, waiting = 4 * pickled + 1000, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise ValueError("its values are nested too deeply or too often")
        if isinstance(value, Mapping):
            waiting.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list | tuple):
            waiting.extend((item, depth + 1) for item in value)


def _tensor(tensor: Tensor, copy: bool, seen: dict[tuple, Tensor]) -> Tensor:
    key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if key not in seen:
        own = tensor.detach()
        if copy or own.untyped_storage().nbytes() != own.numel() * own.element_size():
            own = own.to("cpu", copy=True).contiguous()
        seen[key] = own
    return seen[key]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
