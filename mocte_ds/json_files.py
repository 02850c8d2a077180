"""Reads JSON files written by people and programs: strict, bounded, and every failure is a message."""

import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.plain_values import MOST, require_plain
from mocte_ds.shown import name_shown, path_shown, shown

MOST_BYTES = 64 << 20
"""Of a JSON file; an index of a very large model has a few MB."""


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a small file.

    Args:
        path: a regular file in UTF-8; a byte order mark is passed over.
        most_bytes: a larger file is refused unread.

    Raises:
        ConfigError: it is not there, cannot be read, is too large or is not UTF-8.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"cannot read {path_shown(path)}: it is not a file.")
        if facts.st_size > most_bytes:
            raise ConfigError(
                f"cannot read {path_shown(path)}: {facts.st_size:,} bytes, and {most_bytes:,} are the most for such a "
                "file."
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path_shown(path)}: it is not UTF-8 text (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path_shown(path)}: {getattr(error, 'strerror', None) or error}.") from error


def read_json(path: str | Path) -> Any:
    """Plain values of a JSON file.

    Raises:
        ConfigError: see :func:`read_text` and :func:`parse_json`; names the file. It is a ValueError too.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Plain values of JSON.

    Args:
        text: JSON.
        where: the file or place, for messages.

    Raises:
        ConfigError: no JSON, a key that stands twice in a section (Python would take the last one without a word),
            NaN, a number that is too large, or nesting deeper than any of our files.
    """
    try:
        values = json.loads(
            text,
            object_pairs_hook=_section,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        require_plain(values, "it")
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{where} is too deep or too large to read: {type(error).__name__}.") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    return values


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
