"""The events of a run, for its log and for users' listeners."""

from collections.abc import Callable, Mapping
from typing import Any

from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.run_state import RunState

EventListener = Callable[[dict[str, Any]], None]


class Events:
    """Hands every event to the listeners, on rank 0 only."""

    def __init__(self, run: RunState) -> None:
        """No listener yet."""
        self._run = run
        self._listeners: list[EventListener] = []

    def listen(self, listener: EventListener) -> None:
        """Call ``listener`` with every event from now on."""
        self._listeners.append(listener)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Hand an event over, with the step and the tokens seen so far."""
        if self._run.mesh.world.rank == 0:
            stamped = {"event": event["event"], "step": self._run.step, "tokens": self._run.tokens, **event}
            for listener in self._listeners:
                listener(stamped)

    def emit_projections(self, readings: Mapping[int, BlockReading]) -> None:
        """An event for each block: its documents in their first two singular directions."""
        for index, reading in readings.items():
            self.emit({"event": "projection", "block": index, **reading.projection(self._run.domain_names)})
