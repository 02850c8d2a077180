"""Bounds on values that files bring: nesting, sizes of numbers, characters; checked before any use."""

import math
from collections.abc import Mapping
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.shown import name_shown, shown

MOST_LEVELS = 64
"""Sections within sections."""
MOST = 2**64 - 1
"""Largest integer, for example of a seed."""


def require_plain(values: Any, where: str) -> None:
    """Refuse values that could not be compared, copied or written again.

    Args:
        values: nested dicts and lists; other objects than numbers and texts are not looked at.
        where: their place, for the message.

    Raises:
        ConfigError: deeper than MOST_LEVELS, a number that is NaN, infinite or of more than 64 bits, or a text that is
            not Unicode or holds a zero character.
    """
    stack: list[tuple[Any, str, int]] = [(values, where, 0)]
    while stack:
        value, place, level = stack.pop()
        if isinstance(value, Mapping | list | tuple):
            if level >= MOST_LEVELS:
                raise ConfigError(f"{place}: more than {MOST_LEVELS} sections or lists within each other.")
            if isinstance(value, Mapping):
                for key in value:
                    _require_text(key, place)
                stack += [(inner, f"{place}.{name_shown(key)}", level + 1) for key, inner in value.items()]
            else:
                stack += [(inner, f"{place}[{number}]", level + 1) for number, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{place} = {value}: numbers must be finite.")
        elif isinstance(value, int) and not -MOST <= value <= MOST:
            raise ConfigError(f"{place} = {shown(value)}: numbers must fit into 64 bits.")
        else:
            _require_text(value, place)


def _require_text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: {shown(value)} is not Unicode text.") from error
    if "\0" in value:
        raise ConfigError(f"{place}: {shown(value)} has a zero character in it.")
