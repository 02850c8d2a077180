"""Colour where there is a terminal that shows it, and nowhere else."""

import os
from typing import TextIO

_CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour, or as it is: in a file or pipe, on a dumb terminal, and with `NO_COLOR` set to anything.

    Args:
        text: without line ends.
        colour: `bold`, `red`, `green`, `yellow` or `cyan`.
        stream: that it will be written to.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"
