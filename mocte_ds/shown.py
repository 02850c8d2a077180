"""Values in messages: short, whatever a file holds."""

import difflib
import math
import reprlib
from collections.abc import Iterable
from typing import Any

_WORD = 60
"""Characters of a name that are compared and shown."""
_PATH = 1024
"""Characters of a path that are shown."""


class _Short(reprlib.Repr):
    """repr() cut in width and depth; it never fails."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 6, 12, 12, 6
        self.maxstring, self.maxother = 120, 120

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of many thousand digits.
        if abs(value) < 10**40:
            return repr(value)
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """The value as in Python, cut where it is long, deep, or refers to itself."""
    return _SHORT.repr(value)


def name_shown(name: Any) -> str:
    """The name of a key as it is written, or quoted and cut where that would not be readable."""
    text = name if isinstance(name, str) else shown(name)
    return text if text.isprintable() and len(text) <= _WORD else shown(text)


def path_shown(path: Any) -> str:
    """The whole path, so that people can copy it; quoted if not printable, cut past the longest real ones."""
    text = str(path)
    if len(text) > _PATH:
        text = f"{text[: _PATH // 2]}...{text[-_PATH // 2 :]}"
    return text if text.isprintable() and text else repr(text)


def one_line(error: object, most: int | None = 300) -> str:
    """What an error says, or its type if nothing, on one line of at most so many characters; None: all of it.

    For errors of other libraries, which may repeat whatever stands in a file.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def nearest(name: Any, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'NAME'?` with the nearest of the allowed names, or nothing."""
    near = difflib.get_close_matches(str(name)[:_WORD] if isinstance(name, str) else shown(name), allowed, 1, cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""
