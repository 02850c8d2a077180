"""Ends a process that is told to stop before training begins: there is nothing to save, and a new start goes on."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

EXIT_AGAIN = 75
"""Exit code of a process that was stopped before it had anything to save: start it again (EX_TEMPFAIL)."""
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 5.0  # seconds that Python has to leave by itself: a wait in C++ never comes back to it


def end_on_signals() -> None:
    """End with :data:`EXIT_AGAIN` on SIGTERM or SIGINT, for as long as nobody else handles them.

    Call it first, from the main thread: imports and loading take minutes.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    for number in _NUMBERS:
        signal.signal(number, _leave)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_if_stuck, args=(ours, theirs), name="stop", daemon=True).start()


def _leave(number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        _say(
            f"stopped by {signal.Signals(number).name} before the first step: nothing had to be saved, and what the "
            "run's folder holds is untouched. Start again, and the run goes on from there."
        )
    sys.exit(EXIT_AGAIN)


def _end_if_stuck(ours: socket.socket, _theirs: socket.socket) -> None:
    while found := ours.recv(1):
        if found[0] in _NUMBERS and signal.getsignal(found[0]) is _leave:
            time.sleep(_GRACE)
            if signal.getsignal(found[0]) is _leave:
                os._exit(EXIT_AGAIN)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(text, file=sys.stderr, flush=True)
