"""Progress bars in a log file: a line every 15 seconds and one at the end, also those of lm-eval and transformers."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

SECONDS = 15.0
"""Between two lines of a bar that is not on a terminal."""
_UP = "\x1b[A"  # from a bar below another one


@contextlib.contextmanager
def bars_as_lines() -> Iterator[None]:
    """Context manager: where stderr is not a terminal, bars of tqdm, whoever makes them, write lines that stay.

    tqdm takes the interval from the environment when it is imported; a bar that names its own keeps that.
    """
    before = sys.stderr
    if before is None or before.isatty():
        yield
        return
    os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS))
    sys.stderr = _Lines(before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = before


class _Lines:
    """A stream in which what goes back to the beginning of a line begins a new one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._ended = stream, False

    def write(self, text: str) -> int:
        """A bar writes "\\r" and its state, later "\\n"; or "\\r" and blanks, to make room for another text."""
        shown = text.replace(_UP, "")
        if text.startswith("\r"):
            shown = shown.strip()
            shown, ends = (f"{shown}\n", True) if shown else ("", self._ended)
        elif shown == "\n" and self._ended:
            shown, ends = "", False
        else:
            ends = self._ended and not shown
        self._ended = ends
        self._stream.write(shown)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
