"""Runs programs that start others to their end, and leaves none of them behind when it is asked to stop."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds in which runs that are ended may save."""
_LOOK_EVERY = 0.2


@dataclass(frozen=True)
class Job:
    """A program to be run."""

    name: str
    start: Callable[[int], tuple[Sequence[str], Mapping[str, str]]]
    """From the number of a free place, 0 and up: the program with its options, and its environment."""
    log: Path
    """Gets the output, at its end."""


def run_jobs(jobs: Iterable[Job], at_once: int, finished: Callable[[Job, int], None]) -> None:
    """Run commands, several at a time.

    Ctrl-C and SIGTERM reach the commands and all that they started, and this returns only when they are gone: they
    write into the folders of runs, and a second start must not meet them there.

    Args:
        jobs: in the order in which they are started; asked for the next one when a place is free.
        at_once: places.
        finished: called with a job and its exit code; what it raises ends the others too.

    Raises:
        KeyboardInterrupt: it was asked to stop.
    """
    waiting, running = iter(jobs), dict[int, tuple[Job, subprocess.Popen]]()
    with _StopSignals() as signals:
        try:
            more = True
            while more or running:
                for place in range(at_once):
                    if more and place not in running:
                        job = next(waiting, None)
                        more = job is not None
                        if job is not None:
                            running[place] = (job, _started(job, place))
                signals.let_through()
                time.sleep(_LOOK_EVERY if running else 0)
                signals.hold_back()
                for place, (job, child) in list(running.items()):
                    code = child.poll()
                    if code is not None:
                        _end([child])  # what a launcher that was killed has left behind
                        del running[place]
                        finished(job, code)
            signals.let_through()
        except BaseException:
            signals.hold_back()
            _end([child for _, child in running.values()])
            raise


def _started(job: Job, place: int) -> subprocess.Popen:
    command, environment = job.start(place)
    with job.log.open("a", encoding="utf-8") as file:
        # A group of its own, so that it can be told to end as a whole.
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )


def _end(children: Sequence[subprocess.Popen]) -> None:
    """Ask all processes of some groups to end, and end those that do not."""
    deadline = time.monotonic() + PATIENCE
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)
        while number == signal.SIGTERM and time.monotonic() < deadline and any(map(_is_there, children)):
            time.sleep(0.1)
    for child in children:
        child.wait()


def _is_there(child: subprocess.Popen) -> bool:
    """Whether some process of its group is left."""
    child.poll()  # a process that ended stays in its group until somebody has looked
    try:
        os.killpg(child.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


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
            self._through = False  # another signal must not come in between while programs are ended
            raise KeyboardInterrupt
