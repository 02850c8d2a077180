"""`engine.mocte.log_to`: the lines of metrics.jsonl and events.jsonl, and the monitors' numbers, in any script."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mocte_ds.dist.collectives import first_problem, require_same
from mocte_ds.errors import MocteError
from mocte_ds.flops.mfu import Utilisation
from mocte_ds.logs.folder import LogFolder
from mocte_ds.logs.monitors import Monitors, block_modes, mode_counts


class StepLog:
    """Watches the calls of one engine; it works where a folder was named or DeepSpeed's config turns a monitor on."""

    def __init__(
        self, engine: Any, facts: Callable[[], dict[str, Any]], utilisation: Utilisation | None = None
    ) -> None:
        """Nothing is written yet.

        Args:
            engine: of mocte_ds.initialize.
            facts: makes the content of run.json, on rank 0.
            utilisation: None: lines have no `mfu`.
        """
        self._engine, self._facts, self._utilisation = engine, facts, utilisation
        self._monitors = Monitors(getattr(engine, "monitor", None))
        self._named: str | None = None
        """The folder's name, on all ranks."""
        self._folder: LogFolder | None = None
        """On rank 0."""
        self._begins = True
        """Whether the next line is the first one since the start or a load."""
        self._resumed: list[dict[str, Any]] = []
        """Events of the checkpoint that was loaded last: the load, and the steps that were skipped before it."""
        self._start_step, self._steps_here = 0, 0
        self._loss: Tensor | None = None
        self._loss_known, self._before = True, (0.0, 0)
        self._last: float | None = None
        """When the step began."""
        self._tokens, self._sequences = 0, 0
        self._modes: list[dict[str, Any]] = []
        """Of each block, as the step found them: a check after it may change them."""
        self._frozen_layers = 0
        self.last: dict[str, Any] = {}
        """The line of the last step."""
        self._routed = self._counted() if self.active else []
        engine.mocte.on_event(self._event)

    @property
    def active(self) -> bool:
        """Whether anything is written; the same on all ranks."""
        return self._named is not None or self._monitors.enabled

    # ---- for users -------------------------------------------------------------------------------------------------

    def log_to(self, folder: str | Path) -> None:
        """See Controller.log_to."""
        world = self._engine.mesh.world
        require_same(str(folder), "the folder of engine.mocte.log_to", world)
        if self._named is not None:
            raise MocteError(
                f"log_to({str(folder)!r}): the run logs into {self._named} already; call it once, or name the folder "
                'in the block ("log") and do not call it.'
            )
        if self._steps_here:
            raise MocteError(
                f"log_to({str(folder)!r}) was called after {self._steps_here} steps, which would be missing: call it "
                "before the first step, right after mocte_ds.initialize."
            )
        problem: str | None = None
        if world.rank == 0:
            try:
                self._folder = LogFolder(Path(folder).absolute())
            except MocteError as error:
                problem = str(error)
        problem = first_problem(problem, world)  # the other ranks must not wait for ever
        if problem is not None:
            raise MocteError(problem)
        self._named, self._routed = str(folder), self._counted()
        if self._folder is not None:
            weakref.finalize(self, self._folder.close)  # at the latest when the script ends

    def leave_to_loop(self) -> None:
        """Write nothing, monitors included: the loop that calls this writes its own lines."""
        self._monitors = Monitors(None)

    def close(self) -> None:
        """Write nothing more, and let go of the folder."""
        if self._folder is not None:
            self._folder.close()
        self._folder, self._named = None, None
        self.leave_to_loop()

    # ---- called by the engine --------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """A pass that trains begins."""
        if self._last is None:
            self._last = time.perf_counter()

    def see_loss(self, loss: Any, share: float) -> None:
        """Add what a backward pass begins with.

        Args:
            loss: as the script computed it.
            share: its weight in the step's loss.
        """
        if not self.active:
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            self._loss_known = False
            return
        part = loss.detach().reshape(()).double() * share
        self._loss = part if self._loss is None else self._loss + part

    def before_step(self) -> None:
        """Remember the rate and the optimizer's bytes that a step begins with."""
        if self.active and self._engine.is_gradient_accumulation_boundary():
            mocte, groups = self._engine.mocte, self._engine.optimizer.param_groups
            rate = float(groups[0]["lr"]) if groups else 0.0
            self._before = rate, mocte.optimizer_bytes()
            if self._utilisation is not None:
                self._modes, self._frozen_layers = block_modes(mocte.blocks), mocte.frozen_layers

    def take_back(self) -> None:
        """The step was skipped: neither its losses nor its time count."""
        self._loss, self._loss_known, self._last = None, True, time.perf_counter()

    def after_step(self) -> None:
        """Write the line of an optimizer step (collective)."""
        self._steps_here += 1
        loss, known, self._loss, self._loss_known = self._loss, self._loss_known, None, True
        if not self.active:
            return
        engine, mocte, (rate, size) = self._engine, self._engine.mocte, self._before
        known = known and loss is not None
        mine = [float(known), float(loss) if known and loss is not None else 0.0, float(size)]
        told, routed = mocte.passes.tell_routed(mine)
        norm = engine.get_global_grad_norm()
        load = [(now - before).tolist() for now, before in zip(routed, self._routed, strict=True)]
        now, tokens = time.perf_counter(), mocte.tokens
        seconds = now - self._last if self._last is not None else None
        metrics = {
            "step": engine.global_steps,
            "tokens": tokens,
            "loss": told[:, 1].mean().item() if bool(told[:, 0].all()) else None,
            "lr": rate,
            "grad_norm": float(norm) if norm is not None else None,
            "tokens_per_second": (tokens - self._tokens) / seconds if seconds else None,
            "optimizer_bytes": int(told[:, 2].sum()),
            "optimizer_bytes_by_rank": [int(value) for value in told[:, 2].tolist()],
            "expert_load": load,
            **mode_counts(mocte.blocks),
            "seconds": seconds,
            **({"skipped_steps": engine.skipped_steps} if engine.skipped_steps else {}),
            **self._mfu(tokens - self._tokens, load, seconds),
        }
        self._routed, self._tokens, self._last, self.last = routed, tokens, now, metrics
        self._sequences = mocte.passes.sequences
        self._write("metrics", metrics)
        if engine.mesh.world.rank == 0:
            self._monitors.step(metrics)

    def _mfu(self, tokens: int, load: list[list[int]], seconds: float | None) -> dict[str, float]:
        """The key of a line where the peak of the devices is known."""
        sequences = self._engine.mocte.passes.sequences - self._sequences
        if self._utilisation is None or not (seconds and sequences and self._modes):
            return {}
        blocks = [{**block, "load": counts} for block, counts in zip(self._modes, load, strict=True)]
        return {"mfu": self._utilisation.of_step(tokens, tokens / sequences, blocks, self._frozen_layers, seconds)}

    def saved(self, checkpoint: str, seconds: float) -> None:
        """Write the event of a checkpoint."""
        engine = self._engine
        stamp = {"step": engine.global_steps, "tokens": engine.mocte.tokens}
        self._write("events", {"event": "save", **stamp, "checkpoint": checkpoint, "seconds": seconds})
        if self._last is not None:
            self._last = time.perf_counter()  # a save is beside training

    def validated(self, losses: Mapping[str, float]) -> None:
        """See MocteEngine.log_validation."""
        engine = self._engine
        stamp = {"step": engine.global_steps, "tokens": engine.mocte.tokens}
        event = {"event": "validation", **stamp, "validation": {name: float(loss) for name, loss in losses.items()}}
        self._write("events", event)
        if engine.mesh.world.rank == 0:
            self._monitors.event(event)
        if self._last is not None:
            self._last = time.perf_counter()  # a validation is beside training

    def loaded(self, checkpoint: str, skipped: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a checkpoint: what follows stands after its step (collective).

        Args:
            checkpoint: its folder.
            skipped: events of steps that were skipped just before it was saved. They are of the step that comes next,
                and the files are cut after the one before.
        """
        mocte, step = self._engine.mocte, self._engine.global_steps
        resume = {"event": "resume", "step": step, "tokens": mocte.tokens, "checkpoint": checkpoint}
        self._resumed = [resume, *({**facts, "tokens": mocte.tokens} for facts in skipped)]
        self._begins, self._start_step, self._last = True, step, None
        self._loss, self._loss_known, self._tokens = None, True, mocte.tokens
        self._sequences = mocte.passes.sequences
        if self.active:
            self._routed = self._counted()

    # ---- the files -------------------------------------------------------------------------------------------------

    def _event(self, event: dict[str, Any]) -> None:
        """Of the controller, on rank 0."""
        self._write("events", event)
        self._monitors.event(event)

    def _write(self, name: str, values: dict[str, Any]) -> None:
        folder = self._folder
        if folder is None:
            return
        if self._begins:
            # Not before: a checkpoint that is refused must not change the logs of the run that it belongs to.
            self._begins = False
            folder.begin(self._start_step, self._facts())
            for event in self._resumed:
                folder.write("events", event)
        folder.write(name, values)

    def _counted(self) -> list[Tensor]:
        """Tokens of each expert of each block since the start, all ranks together (collective)."""
        return self._engine.mocte.passes.routed()
