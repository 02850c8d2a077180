"""What watches a run: the watchdog, the pace of the ranks, loss spikes, and losses that are not numbers."""

import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocte_ds.dist.collectives import from_rank_zero
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import NonFiniteLoss, NotOurs
from mocte_ds.hosts.retries import last_checkpoint
from mocte_ds.logs.files import cannot_write
from mocte_ds.skips import Skips, described, warn
from mocte_ds.training.left_out import LeftOut
from mocte_ds.training.lost import LostRank, write_cause
from mocte_ds.training.watch_section import WatchSection
from mocte_ds.watch.pace import Pace
from mocte_ds.watch.prometheus import FILE, Prometheus
from mocte_ds.watch.spikes import LossSpikes
from mocte_ds.watch.watchdog import Watchdog, note_folder

Event = Callable[..., None]


class Watch:
    """Watches one run on this rank."""

    def __init__(self, settings: WatchSection, out: Path, batch: int, left_out: LeftOut, axis: Axis) -> None:
        """Nothing is watched yet.

        Args:
            settings: of the run file.
            out: the run's folder.
            batch: sequences of an optimizer step.
            left_out: sequences that the run leaves out.
            axis: all ranks.
        """
        self._settings, self._out, self._batch, self._left_out = settings, out, batch, left_out
        self._pace, self._spikes = Pace(), LossSpikes(settings.loss_spike)
        self._axis, self.rank = axis, axis.rank
        self._prometheus = Prometheus(out) if settings.prometheus and self.rank == 0 else None
        self._line: dict[str, Any] | None = None
        """Of metrics.jsonl, the last one."""
        self._dog: Watchdog | None = None

    def begin(self) -> None:
        """Let the watchdog out (collective)."""
        limit = self._settings.stalled_after
        if not limit:
            return
        if self.rank == 0:
            note_folder(self._out)  # before any rank makes it
        start = from_rank_zero(uuid.uuid4().hex, self._axis)
        long_limit = max(limit, self._settings.long_phases)
        self._dog = Watchdog(self._out, self.rank, self._axis.size, start, limit, long_limit, self._last_words)
        self._dog.begin()

    def end(self) -> None:
        """Tie it up."""
        if self._dog is not None:
            self._dog.end()
            self._dog = None

    def facts(self, seconds: Sequence[float], summary: bool) -> dict[str, Any]:
        """What metrics.jsonl says of the pace of the ranks.

        Args:
            seconds: of work of each rank since the last step.
            summary: whether the percentiles of the last steps are due.
        """
        if not any(seconds):
            return {}  # the first step of a start, a long phase in which nobody's work is counted
        facts = self._pace.see(seconds)
        return {**facts, **self._pace.percentiles()} if summary else facts

    def publish(self, metrics: dict[str, Any], last: bool) -> None:
        """Let outside monitors have the numbers of a step.

        Args:
            metrics: line of metrics.jsonl.
            last: whether the run ends with it.

        Raises:
            MocteError: they cannot be written.
        """
        self._line = metrics
        if self._prometheus is None:
            return
        try:
            self._prometheus.step(metrics, last)
        except OSError as error:
            raise cannot_write(self._out / FILE, error) from error
        except NotOurs as error:  # a monitor's file must not end a run
            logging.getLogger("mocte_ds").warning(f"{error} No further numbers are written there.")
            self._prometheus = None

    def publish_last(self) -> None:
        """Publish the last step's numbers, if there are any: the run ends with a step that was skipped.

        Raises:
            MocteError: as of :meth:`publish`.
        """
        if self._line is not None:
            self.publish(self._line, last=True)

    def look_at_loss(self, loss: float, end: int, event: Event) -> None:
        """Log a loss that stands out.

        Args:
            loss: of the step.
            end: number of the first sequence after the step's.
            event: logs.
        """
        found = self._spikes.see(loss)
        if found:
            event("loss_spike", **found, sequences=[end - self._batch, end - 1])
            if self.rank == 0:
                logging.getLogger("mocte_ds").warning(
                    f"loss spike: {loss:.3f}, {found['deviations']:.0f} deviations above {found['median']:.3f}."
                )

    def require_finite(self, what: str, value: float, step: int, end: int) -> None:
        """End the run at a value that is NaN or infinite; every rank passes the same.

        Args:
            what: is looked at.
            value: of the step.
            step: its number.
            end: number of the first sequence after the step's.

        Raises:
            NonFiniteLoss: names step and sequences. With `watch.leave_out` its exit code lets launchers start again.
        """
        if np.isfinite(value):
            return
        first = end - self._batch
        self._end(f"the {what} of step {step} is {value} (sequences {first} to {end - 1} of the data).", [first])

    def skips(self, end: Callable[[], int], event: Event) -> Skips:
        """What skips steps of the run.

        Args:
            end: number of the first sequence after those that were read.
            event: logs.
        """

        def tell(skipped: dict[str, Any]) -> None:
            warn(skipped, self.rank)
            event(**skipped)

        def where() -> dict[str, Any]:
            return {"sequences": [end() - self._batch, end() - 1]}

        return Skips(self._settings.skip_nonfinite, self._axis, tell, where, self.give_up)

    def give_up(self, streak: Sequence[dict[str, Any]]) -> None:
        """End the run: more steps in a row than `watch.skip_nonfinite` were not finite.

        Args:
            streak: the events of all of them, the last one among them, with their `sequences` where they are known.

        Raises:
            NonFiniteLoss: as of :meth:`require_finite`.
        """
        *_, last = streak
        said = f"{described(last)} is not finite in step {last['step']}"
        known = [facts["sequences"] for facts in streak if "sequences" in facts]
        places = ", ".join("{} to {}".format(*facts["sequences"]) for facts in streak[:-1] if "sequences" in facts)
        said += f", after {len(streak) - 1} skipped in a row (watch.skip_nonfinite; sequences {places or 'unknown'})."
        self._end(said, [first for first, _ in known])

    def _end(self, said: str, firsts: Sequence[int]) -> None:
        """End the run because of the batches that begin at some sequences."""
        folder = self._out / "checkpoints"
        good = (last_checkpoint(self._out) or "none yet").rpartition("/")[2]
        more, limit = [first for first in firsts if first not in self._left_out.starts], self._settings.leave_out
        room = self._left_out.room(limit, len(more))
        error = NonFiniteLoss(
            f"{said} The run stops and nothing of this step is saved; the last good checkpoint in {folder} is: {good}. "
            + (self._leave_out(more) if room else self._advice(len(firsts)))
        )
        if room:
            error.exit_code = 1  # the next start gets past them
        raise error

    def _advice(self, count: int) -> str:
        limit, gone = self._settings.leave_out, len(self._left_out.starts)
        text = "Lower training.learning_rate, or look at that text, and start again."
        if gone:
            text += f" {gone} batches were left out already; watch.leave_out = {limit} has no room for {count} more."
        return text

    def _leave_out(self, firsts: Sequence[int]) -> str:
        if self.rank == 0:
            self._left_out.add(firsts)
        return (
            "The next start goes on from there and leaves these sequences out "
            f"({len(self._left_out.starts) + len(firsts)} of {self._settings.leave_out} batches, watch.leave_out)."
        )

    def _last_words(self, text: str) -> str:
        good = last_checkpoint(self._out)
        words = f"The last good checkpoint is {good}. " if good else "There is no checkpoint yet. "
        words += "The run ends; start it again, and it goes on from there."
        write_cause(self._out, self.rank, LostRank(f"{text} {words}"))
        return words
