"""Where this rank stands: the step, and the phase of it that the main thread is in."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a rank stands at one moment."""

    step: int
    count: int
    """Phases begun and ended in the step: about the same on ranks that are equally far."""
    name: str
    """The phase, and those around it."""
    since: float
    """When it began, in seconds since 1970 by this host's clock."""
    begun: float
    """When it began, by the clock of this process that never jumps."""
    long: bool
    """Whether the phase, or one around it, may take long."""


class Heartbeat:
    """The place of a rank, and how long it has worked without waiting for others.

    Only one thread moves it at a time: the main one, or autograd's while the main one waits for it.
    """

    def __init__(self) -> None:
        """Nothing has begun."""
        self._step = 0
        self._stack: list[tuple[str, bool, bool]] = []
        self._count, self._working, self._mark = 0, 0.0, time.perf_counter()
        self._place = Place(0, 0, "nothing", time.time(), time.monotonic(), False)
        self.mark: Callable[[str], contextlib.AbstractContextManager[Any]] | None = None
        """While a profiler records: marks what is done in its trace."""

    @property
    def place(self) -> Place:
        """Where the rank stands now; for any thread."""
        return self._place

    @property
    def name(self) -> str:
        """The innermost phase; empty where none has begun."""
        return self._stack[-1][0] if self._stack else ""

    def begin_step(self, step: int) -> None:
        """Begin an optimizer step."""
        self._step, self._count = step, 0
        self._move()

    @contextlib.contextmanager
    def phase(self, name: str, waits: bool = False, long: bool = False) -> Iterator[None]:
        """Be in a phase.

        Args:
            name: what is done, as a watcher is to read it.
            waits: whether most of it is waiting for other ranks.
            long: whether it has the limit of long phases, and does not count as work of a step.
        """
        self._count_work()
        self._stack.append((name, waits or long, long))
        self._move()
        try:
            with self.part(name.partition(" of ")[0] if name.startswith("experts of ") else name):
                yield
        finally:
            self._count_work()
            self._stack.pop()
            self._move()

    def part(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Mark a part of a phase in the trace of a profiler; without one this costs next to nothing."""
        return self.mark(name) if self.mark else contextlib.nullcontext()

    def take_working_seconds(self) -> float:
        """Seconds of work, without waiting and without long phases, since the last call."""
        self._count_work()
        taken, self._working = self._working, 0.0
        return taken

    def _count_work(self) -> None:
        now = time.perf_counter()
        if self._stack and not any(waits for _, waits, _ in self._stack):
            self._working += now - self._mark
        self._mark = now

    def _move(self) -> None:
        self._count += 1
        name = " > ".join(name for name, _, _ in self._stack) or "between two phases"
        long = any(long for _, _, long in self._stack)
        self._place = Place(self._step, self._count, name, time.time(), time.monotonic(), long)


HEART = Heartbeat()
"""Of this process."""
phase, part = HEART.phase, HEART.part
