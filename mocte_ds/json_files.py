"""Reads JSON files written by people and programs: strict, bounded, and every failure is a message."""

import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.shown import name_shown, path_shown, shown
from mocte_ds.value_bounds import MOST, require_plain

MOST_BYTES = 64 << 20
"""Of a JSON file; the largest index of a published model has some 10 MB."""

_LARGEST_TEXT = 1 << 28
_TEXTS = (".json", ".txt", ".model", ".jinja", ".py")
_DIGITS = 4300
"""Of an integer, as many as Python reads: the time grows with the square."""


def read_text(path: str | Path, most_bytes: int = MOST_BYTES, kind: type[MocteError] = ConfigError) -> str:
    """The text of a small file.

    Args:
        path: a regular file in UTF-8; a byte order mark is passed over.
        most_bytes: a larger file is refused unread.
        kind: of the error.

    Raises:
        MocteError: of the given kind: the file is missing, cannot be read, is too large or is not UTF-8.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise kind(f"cannot read {path_shown(path)}: it is not a file.")
        if facts.st_size > most_bytes:
            raise kind(
                f"cannot read {path_shown(path)}: {facts.st_size:,} bytes, and {most_bytes:,} are the most for such a "
                "file."
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"cannot read {path_shown(path)}: it is not UTF-8 text (byte {error.start}).") from error
    except FileNotFoundError as error:
        raise kind(f"cannot read {path_shown(path)}: {error.strerror}; it is missing.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, MocteError):
            raise
        raise kind(f"cannot read {path_shown(path)}: {getattr(error, 'strerror', None) or error}.") from error


def read_json(path: str | Path, kind: type[MocteError] = ConfigError, foreign: bool = False) -> Any:
    """Plain values of a JSON file.

    Args:
        path: see :func:`read_text`.
        kind: of the error.
        foreign: see :func:`parse_json`.

    Raises:
        MocteError: of the given kind, see :func:`read_text` and :func:`parse_json`; names the file.
    """
    return parse_json(read_text(path, kind=kind), path_shown(path), kind, foreign)


def read_object(path: str | Path, kind: type[MocteError] = ConfigError, foreign: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; like :func:`read_json`, and other values than an object are errors too."""
    values = read_json(path, kind, foreign)
    if not isinstance(values, dict):
        raise kind(f"{path_shown(path)} holds a {type(values).__name__}, not an object with keys; it is damaged.")
    return values


def parse_json(text: str, where: str, kind: type[MocteError] = ConfigError, foreign: bool = False) -> Any:
    """Plain values of JSON.

    Args:
        text: JSON.
        where: the file or place, for messages.
        kind: of the error.
        foreign: what others' programs write is taken too: NaN and Infinity, as Python writes them, and integers of more
            than 64 bits (tokenizers of Hugging Face have a `model_max_length` of 1e30 in full).

    Raises:
        MocteError: of the given kind: not JSON, a key that stands twice in an object (Python would take the last one
            without a word), NaN, a number that is too large, or nesting deeper than any of our files.
    """
    try:
        values = (_LENIENT if foreign else _STRICT).decode(text)
        if not foreign:
            require_plain(values, "it")
    except (RecursionError, MemoryError) as error:
        raise kind(f"{where} is nested too deep, or too large to read ({type(error).__name__}).") from error
    except ConfigError as error:
        raise kind(f"{where}: {error}") from error
    except ValueError as error:
        raise kind(f"{where} is not JSON: {error}.") from error
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
            raise kind(f"{path_shown(path)} is a device or a pipe, not a file.")
        if (size := path.stat().st_size) > _LARGEST_TEXT:
            raise kind(
                f"{path_shown(path)} has {size:,} bytes; no config or tokenizer has more than {_LARGEST_TEXT:,}."
            )


def _section(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ConfigError(f"the key {shown(key)} is there twice in one section; remove one.")
            seen.add(key)
    return values


def _refuse_constant(text: str) -> Any:
    raise ConfigError(f"{text} is not a number in JSON; numbers must be finite.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError(f"the number {name_shown(text)} is too large.")
    return value


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else MOST + 1
    if abs(value) > MOST:
        raise ConfigError(f"the number {name_shown(text)} is too large: it must fit into 64 bits.")
    return value


def _readable(text: str) -> int:
    if len(text) > _DIGITS:
        raise ConfigError(f"the number {name_shown(text)} is too large: it has {len(text):,} digits.")
    return int(text)


# Made once: json.loads makes one a call where it is given hooks, which takes longer than a line of a corpus.
_STRICT = json.JSONDecoder(
    object_pairs_hook=_section, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_section, parse_int=_readable)
