"""Runs a program that starts others to its end, and leaves none of them behind when it is asked to stop."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds in which a run that is ended may save."""


def run_to_end(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command, its output into the end of a file.

    Ctrl-C and SIGTERM reach the command and all that it started, and this returns only when they are gone: they write
    into the run's folder, and a second start must not meet them there.

    Args:
        command: the program and its options.
        log: file that gets the output.
        environment: of the program.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: it was asked to stop.
    """
    with log.open("a", encoding="utf-8") as file, _StopSignals() as signals:
        # A group of its own, so that it can be told to end as a whole.
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            signals.let_through()
            return child.wait()
        except BaseException:
            signals.hold_back()
            _end_group(child)
            raise


def _end_group(child: subprocess.Popen) -> None:
    """Ask all processes of a group to end, and end those that do not."""
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()  # a process that ended stays in its group until somebody has looked
            os.killpg(child.pid, 0)
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class _StopSignals:
    """SIGTERM and SIGHUP do as Ctrl-C does, but none of them while a program is being started or ended."""

    def __init__(self) -> None:
        self._asked, self._through = False, False

    def __enter__(self) -> "_StopSignals":
        # Python lets the main thread set handlers only.
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
        self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def let_through(self) -> None:
        """Raise KeyboardInterrupt at the next signal, or now if there was one."""
        self._through = True
        if self._asked:
            raise KeyboardInterrupt

    def hold_back(self) -> None:
        """Only note that a signal came."""
        self._through = False

    def _stop(self, _number: int, _frame: Any) -> None:
        self._asked = True
        if self._through:
            raise KeyboardInterrupt
