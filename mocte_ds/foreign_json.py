"""JSON files that others have written: a plain object in a file of bounded size, or an error that names the file."""

import json
from pathlib import Path
from typing import Any

from mocte_ds.errors import MocteError

MOST_BYTES = 1 << 26
"""Of a file that is read; the largest index of a published model has some 10 MB."""

_LARGEST = 1 << 28
_TEXTS = (".json", ".txt", ".model", ".jinja", ".py")


def read_object(path: Path, kind: type[MocteError]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: only read.
        kind: of the error.

    Raises:
        MocteError: of the given kind: the file is missing, too large, nested too deep, damaged, or holds something else
            than one object, or a key twice.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise kind(f"{path} is not a file.")
        if size > MOST_BYTES:
            raise kind(f"{path} has {size:,} bytes; at most {MOST_BYTES:,} are read of such a file.")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise kind(f"{path} is missing.") from error
    except RecursionError as error:
        raise kind(f"{path} is nested too deep; it is damaged or not what its name says.") from error
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read: {_short(error)}.") from error
    if not isinstance(values, dict):
        raise kind(f"{path} holds a {type(values).__name__}, not an object with keys; it is damaged.")
    return values


def require_small(folder: Path, kind: type[MocteError]) -> None:
    """Refuse a folder where a text is endless, or larger than any config or tokenizer.

    Args:
        folder: whose files beside the weights are looked at; nothing is read.
        kind: of the error.

    Raises:
        MocteError: of the given kind: names the file.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in _TEXTS or not path.exists() or path.is_dir():
            continue
        if not path.is_file():
            raise kind(f"{path} is a device or a pipe, not a file.")
        if (size := path.stat().st_size) > _LARGEST:
            raise kind(f"{path} has {size:,} bytes; no config or tokenizer has more than {_LARGEST:,}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice, and which one counts is unclear")
    return values


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:300].rstrip(".")
