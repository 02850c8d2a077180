"""When a run looks at itself: the window of a check, its measurements, and its decisions some steps later."""

from collections.abc import Mapping
from typing import Any

import torch

from mocte_ds.controller.changer import Changer
from mocte_ds.controller.check import Check, Looks
from mocte_ds.controller.decide import decide
from mocte_ds.controller.events import Events
from mocte_ds.controller.passes import Passes
from mocte_ds.controller.progress import Progress
from mocte_ds.controller.proof import Proof
from mocte_ds.controller.run_state import RunState
from mocte_ds.moe.block import BlockMode

READ_EVERY = 10
"""Checks between two readings of the features of emerged blocks where conflict is never measured."""


class Checks:
    """Runs the checks: each measures after one optimizer step and decides `apply_after` steps later.

    In between, the search for clusters runs in a thread. The later step is the same on all ranks and in a resumed run.
    """

    def __init__(
        self, run: RunState, passes: Passes, progress: Progress, proof: Proof, events: Events, changer: Changer
    ) -> None:
        """Of a run and what watches it."""
        self._run, self._passes, self._progress = run, passes, progress
        self._proof, self._events, self._changer = proof, events, changer
        self.interval = max(1, round(run.config.check_every * run.total_steps))
        """Optimizer steps between two checks."""
        self.window = self.interval
        """Steps before a check whose features it samples."""
        self._pending: Check | None = None
        """The check that has measured and not decided yet."""
        self._shared_state: dict[str, Any] | None = None
        """A check from a checkpoint, until this rank's own part of it is loaded."""
        self._sampled_step = -1
        """Optimizer steps before the last sampled one."""

    def set_window(self, sequences_per_step: int) -> None:
        """Make the window long enough that few rows come from one sequence: neighbours in a sequence are alike."""
        spectrum = self._run.config.spectrum
        enough = max((spectrum.rows << spectrum.doublings) / 16, spectrum.documents) / sequences_per_step
        self.window = min(self.interval, max(1, round(enough + 0.5)))

    def samples_after(self, steps: int) -> bool:
        """Whether a check wants the features of the step that follows ``steps`` finished ones."""
        return self._run.config.auto and self.interval - steps % self.interval <= self.window

    def begin_pass(self) -> bool:
        """Begin a new sample where a window begins; whether the pass that is about to run is sampled for a check.

        What a check has read stays until the next window, for `emerge()`; without checks the rows of the last step do.
        """
        run = self._run
        if self._sampled_step != run.step and (
            not run.config.auto or self.interval - run.step % self.interval == self.window
        ):
            run.samples.clear()
        self._sampled_step = run.step
        unread = run.config.auto and not self._reads_all(run.step // self.interval + 1)
        run.samples.unread = {h.block for h in run.blocks if unread and h.mode is not BlockMode.WARMUP}
        return self.samples_after(run.step)

    def forget_pass(self) -> None:
        """Take the next pass for the first one of its step."""
        self._sampled_step = -1

    def after_step(self) -> None:
        """Measure or decide if that is due after the step that was just done (collective)."""
        run = self._run
        last = run.step == run.total_steps
        if self._pending is not None and (run.step >= self._pending.step + self._delay or last):
            self._decide()
        if run.config.auto and run.step % self.interval == 0 and run.step <= run.total_steps:
            self._measure()
            if not self._delay or last:
                self._decide()

    @property
    def _delay(self) -> int:
        """Steps from a check's measurements to its decisions: a check is over before the next one begins."""
        return min(self._run.config.apply_after, self.interval - 1)

    def _measure(self) -> None:
        run = self._run
        self._proof.require_frozen_unmoved(run)
        for handle, counts in zip(run.blocks, self._passes.routed(), strict=True):
            for expert, count in zip(handle.experts, counts.tolist(), strict=True):
                expert.tokens = count
        looks = self._looks(run.step // self.interval)
        self._pending = Check.measure(run, self._progress, looks, in_background=self._delay > 0)

    def _reads_all(self, number: int) -> bool:
        """Whether the check of that number reads emerged blocks, too: nothing waits for their features.

        It is the one before conflict is measured, between the clusters that it finds; and the last one, which the
        report shows.
        """
        run = self._run
        last = (number + 1) * self.interval > run.total_steps
        return last or (number + 1) % (run.config.conflict_every or READ_EVERY) == 0

    def _looks(self, number: int) -> Looks:
        """What the check of that number looks at; blocks take turns in rollbacks, each of which costs a pass."""
        run, progress, every = self._run, self._progress, self._run.config.conflict_every
        # Two at a time: each turn needs a pass with today's experts, too.
        turns = [h for h in run.blocks if every and (number + h.index // 2 + 2) % every == 0]
        return Looks(
            read=[h for h in run.blocks if h.mode is BlockMode.WARMUP or self._reads_all(number)],
            rolled_back=run.blocks if progress.at_every_check else turns,
            conflict=progress.active and every > 0 and number % every == 0,
        )

    def _decide(self) -> None:
        run, check = self._run, self._pending
        assert check is not None
        self._pending = None
        check.finish(run)
        plan = decide(run.status(check.share, check.step), check.cluster_status(), run.config)
        for block, streak in plan.streaks.items():
            run.blocks[block].streak = streak
        self._events.emit(check.event(run))
        if plan.changes:
            self._changer.apply(plan.changes, check.readings)
        if run.share >= 1.0:
            self._events.emit_projections(check.readings)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """What all ranks know of a check that has not decided yet (collective: waits for the end of its search)."""
        return self._pending.state_dict(self._run) if self._pending else None

    def rank_state_dict(self) -> dict[str, Any]:
        """What only this rank has: its samples, where the next check needs them, and its part of a pending check."""
        run = self._run
        # The next check needs the rows of its window so far; those of an earlier one are large and no longer needed.
        needed = not run.config.auto or self.interval - run.step % self.interval < self.window
        return {
            "samples": run.samples.state_dict() if needed else None,
            "check": self._pending.own_state_dict() if self._pending else None,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned; the check is complete with :meth:`load_rank_state_dict`."""
        self._pending, self._shared_state = None, state
        self.forget_pass()

    def load_rank_state_dict(self, state: Mapping[str, Any] | None, device: torch.device) -> None:
        """Restore what :meth:`rank_state_dict` returned; None: a pending check is dropped."""
        shared, self._shared_state = self._shared_state, None
        self._run.samples.clear()
        if state is None:
            return
        if state["samples"]:
            self._run.samples.load_state_dict(state["samples"], device)
        if shared and state["check"]:
            self._pending = Check.restored(shared, state["check"], device)
