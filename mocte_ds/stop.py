"""Ends a process that is told to stop before training begins: there is nothing to save, and a new start goes on."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

EXIT_AGAIN = 1
"""Exit code of a process that was stopped before it had anything to save: a failure that is not the user's.

Less than the code of a user's error, since srun reports the largest one of all ranks.
"""
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_code = EXIT_AGAIN
_GRACE = 5.0  # seconds that Python has to leave by itself: a wait in C++ never comes back to it


def handles_signals() -> bool:
    """Whether :func:`end_on_signals` or :func:`end_soon` does, and nobody else."""
    return all(signal.getsignal(number) in (_leave, _wait) for number in _NUMBERS)


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


def end_soon(code: int) -> None:
    """From now on SIGTERM and SIGINT leave the process some seconds to end by itself; after them it ends with a code.

    For the time after training: what it has to say must not be cut off by a launcher that ends all ranks.

    Args:
        code: exit code.
    """
    global _code
    _code = code
    for number in _NUMBERS:
        signal.signal(number, _wait)


def _wait(_number: int, _frame: FrameType | None) -> None:
    """The thread below ends the process, if it is still there then."""


def _leave(number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        _say(
            f"stopped by {signal.Signals(number).name} before the first step: nothing had to be saved, and what the "
            "run's folder holds is untouched. Start again, and the run goes on from there."
        )
    sys.exit(EXIT_AGAIN)


def _end_if_stuck(ours: socket.socket, _theirs: socket.socket) -> None:
    while found := ours.recv(1):
        if found[0] in _NUMBERS and signal.getsignal(found[0]) in (_leave, _wait):
            time.sleep(_GRACE)
            if signal.getsignal(found[0]) in (_leave, _wait):
                os._exit(_code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(text, file=sys.stderr, flush=True)
