"""The training loop, top to bottom: model, engine, data, steps, validation, checkpoints."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mocte_ds.config import MocteConfig
from mocte_ds.data import BlendedLoader, validation_batches
from mocte_ds.data.stored_tokenizer import keep_tokenizer, open_tokenizer, tokenizer_in
from mocte_ds.deepspeed_settings import type_of_weights
from mocte_ds.dist.collectives import stack_over_ranks, wait_for_all
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.flops.ledger import Ledger
from mocte_ds.flops.mfu import Utilisation, device_peak
from mocte_ds.flops.model_sizes import model_sizes
from mocte_ds.logs.files import write_json
from mocte_ds.logs.monitors import block_modes, mode_counts
from mocte_ds.moe.attach import matching_modules
from mocte_ds.ownership.run_lock import RunLock
from mocte_ds.seeds import derived_seed
from mocte_ds.stop import end_soon, handles_signals
from mocte_ds.training.changes import tell_changes
from mocte_ds.training.init import InitialWeights
from mocte_ds.training.left_out import LeftOut
from mocte_ds.training.make_engine import make_engine, optimizer_bytes, seed_everything
from mocte_ds.training.model import Forward, make_model, model_record
from mocte_ds.training.profile import Profile, profile_of_run
from mocte_ds.training.record import run_record
from mocte_ds.training.run_folder import TOOL, checkpoint_tag
from mocte_ds.training.saving import Pruning, finish, load, prepare, save
from mocte_ds.training.start import Start
from mocte_ds.training.telemetry import Telemetry, expect_board
from mocte_ds.training.validation import Validation, probe_rows
from mocte_ds.training.watching import Watch
from mocte_ds.watch import HEART, part, phase

PROBE_SEQUENCES = 8
"""Of a domain at most, for the probe set of checks."""


class Trainer:
    """One run on this rank."""

    def __init__(self, start: Start, lock: RunLock | None = None) -> None:
        """Build the engine, open the data and go on from the checkpoint, if there is one (collective).

        Args:
            start: from :func:`mocte_ds.training.start.make_start`.
            lock: of the run's folder, on rank 0.
        """
        self.start, self.run, self.out, self.lock = start, start.run, start.out, lock
        self.rank = mesh_of_processes().world.rank
        t, settings = self.run.training, start.settings
        self.config = MocteConfig.from_dict(settings["mocte"]) if "mocte" in settings else None
        # Looked at before a model of the sizes that it claims is made.
        init = InitialWeights(self.run.init) if self.run.init is not None and start.checkpoints is None else None
        seed_everything(t.seed)
        draws, dtype = init is None and start.checkpoints is None, type_of_weights(settings)
        model = make_model(self.run.model, start.manifest.eod_id, draws, dtype)
        self.forward = Forward(model, start.manifest.eod_id if self.run.data.document_mask else None, t.compile)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.sizes = model_sizes(model, matching_modules(model, self.config.modules) if self.config else ())
        peak, ranks = device_peak(self.run.watch.peak_tflops, settings), mesh_of_processes().world.size
        self.utilisation = Utilisation(self.sizes, self.config, ranks, peak) if peak else None
        if init:
            init.require_fit(self.config, model, (settings.get("zero_optimization") or {}).get("stage", 0))
            init.fill(model)
        board = settings.get("tensorboard") or {}
        if self.rank == 0 and board.get("enabled") and board.get("output_path") == str(self.out / "tensorboard"):
            expect_board(self.out)
        self.engine = make_engine(model, settings, t.compile)
        self.mesh = self.engine.mesh
        if init and self.config:
            init.begin(self.engine.mocte)
        prepare(self.engine, start.identity)
        # Every rank draws other numbers from here on; the weights above had to be the same.
        seed_everything(derived_seed(t.seed, "rank", self.mesh.data.rank))
        batch = f"batches of {t.batch_tokens} tokens, {self.run.context} a sequence"
        data = f"{start.manifest.sha256}, seed {t.seed}, weights {self.run.data.weights}, {batch}"
        left_out = LeftOut(self.out, data, self.mesh.world)
        self.loader = BlendedLoader(
            start.prepared,
            "train",
            self.run.context,
            t.batch_tokens // self.run.context,
            self.mesh.data.rank,
            self.mesh.data.size,
            t.micro_batch,
            t.seed,
            self.run.data.weights,
            verify=None,  # Start.verify_data has done it
            left_out=left_out.starts,
        )
        validated = self.run.evaluation.sequences_per_domain
        held_out = validation_batches(start.prepared, self.run.context, validated + PROBE_SEQUENCES, None)
        scored = {name: (ids[:validated], labels[:validated]) for name, (ids, labels) in held_out.items()}
        self.validation = Validation(scored, t.micro_batch, self.forward, self.mesh.data)
        probe = probe_rows({name: ids[validated:] for name, (ids, _) in held_out.items()}, self.loader.domains)
        if self.config and probe:  # without one, some sequences of the first step will do
            self.engine.mocte.set_probe(domain=probe[1], **self.forward.inputs(probe[0]))
        self.ledger, self.stop_asked, self._saved = Ledger(), False, 0
        self._prune = Pruning(self.out / "checkpoints", t.keep_checkpoints, self.rank)
        self.watch = Watch(self.run.watch, self.out, self.loader.batch_size, left_out, self.mesh.world)
        self.engine.skips = self.watch.skips(lambda: self.loader.position, self._event)
        if start.checkpoints:
            assert start.tag is not None  # resume_folder finds none without a checkpoint in it
            client_state = load(self.engine, start.checkpoints, start.tag)
            self.loader.seek(client_state["data_position"])
            self._saved = self.engine.global_steps
            self.ledger.load(client_state["ledger"])
        # A checkpoint that is refused leaves nothing behind.
        if self.rank == 0:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            keep_tokenizer(open_tokenizer(tokenizer_in(start.prepared)), self.out)
            facts = run_record(start, self.config, self.parameters, self.mesh.world.size)
            write_json(self.out / "run.json", facts, TOOL)
        monitor = getattr(self.engine, "monitor", None)
        self.telemetry = Telemetry(self.out, self.rank == 0, t.steps, self.engine.global_steps, monitor)
        if start.checkpoints:
            note = self.engine.checkpoint_engine.note
            resumed = {"checkpoint": str(start.checkpoints / str(start.tag)), "position": self.loader.position}
            self._event("resume", **resumed, **({"note": note} if note else {}))
            tell_changes(start.changes, self.engine, self.loader.position, self._event, self.rank)
        for event in self.engine.skips.streak:
            self._event(**event)  # of the step that comes next, which the log has dropped
        if left_out.starts:
            self._event("left_out", first_sequences=left_out.starts)
        if self.config:
            self.engine.step_log.leave_to_loop()
            self.engine.mocte.on_event(self._mocte_event)

    def train(self, stop_after: int | None, profiled: range | None = None) -> bool:
        """Train to the end of the budget, or up to ``stop_after``; SIGTERM and SIGINT save after the current step.

        Args:
            stop_after: step.
            profiled: steps that a profiler records.

        Returns:
            True if the budget is done.

        Raises:
            NonFiniteLoss: the loss or the gradient is NaN or infinite; the last good checkpoint stays.
        """
        ours, code = handles_signals(), 1
        before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.watch.begin()
            done = self._train(stop_after, profile_of_run(profiled, self.engine, self.out))
            self.watch.end()
            self.telemetry.close()
            code = 0
            return done
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            self.watch.end()
            # What a disk that is full or a rank that is gone leads to afterwards must not hide what happened first.
            self.telemetry.close(after_error=True)
            self.engine.checkpoint_engine.saver.tell()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if ours:
                end_soon(code)

    def _train(self, stop_after: int | None, profile: Profile | None) -> bool:
        t = self.run.training
        last = min(t.steps, stop_after if stop_after is not None else t.steps)
        batches, started, first = iter(self.loader), time.perf_counter(), True
        while self.engine.global_steps < last:
            if self.lock:
                self.lock.require_held()
            HEART.begin_step(self.engine.global_steps + 1)
            if profile:
                profile.begin(self.engine.global_steps + 1)
            with phase("first step", long=True) if first else contextlib.nullcontext():
                metrics, stopping = self._step(batches)
            step, first = self.engine.global_steps, False
            ends = stopping or step == last
            if metrics is not None:
                started = self._after_step(metrics, started, ends, profile)
            else:  # skipped; the time counts for nothing
                started = time.perf_counter()
                if ends:
                    self.watch.publish_last()
                if ends and profile:
                    profile.tell(step, ends, self._event)
            if step > self._saved and (ends or step % self.run.checkpoint_every == 0):
                with phase("checkpoint", long=True):
                    self._save(step)
                started = time.perf_counter()
            if stopping:
                if step < t.steps:  # SLURM starts again what was stopped
                    self._event("stop", reason="a signal asked for it")
                break
        with phase("checkpoint", long=True):
            finish(self.engine)
            self._prune(self.engine.global_steps)  # the last one may have come just now
        return self.engine.global_steps >= t.steps

    def _after_step(self, metrics: dict[str, Any], started: float, ends: bool, profile: Profile | None) -> float:
        """Validate and log; when the time of the next step begins."""
        step = metrics["step"]
        if step % self.run.validate_every == 0 or step == self.run.training.steps:
            with phase("validation", long=True):
                metrics["validation"] = self.validation.losses(self.engine)
            tokens, blocks = self.validation.tokens, self._modes()[0]
            self.ledger.validate(self.sizes, tokens, self.run.context, self.config, blocks)
        now = time.perf_counter()
        metrics["seconds"] = now - started
        with part("logging"):
            self.telemetry.step(metrics)
            self.watch.publish(metrics, ends)
            self.watch.look_at_loss(metrics["loss"], self.loader.position, self._event)
        return time.perf_counter() if profile and profile.tell(step, ends, self._event) else now

    def _step(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any] | None, bool]:
        """One optimizer step: its line of metrics.jsonl or None if it was skipped; whether a rank was asked to stop."""
        engine, t, before = self.engine, self.run.training, self.engine.global_steps
        started, total = time.perf_counter(), 0.0
        rate = engine.optimizer.param_groups[0]["lr"]
        turns = engine.gradient_accumulation_steps()
        drawing = contextlib.nullcontext if self.config else engine.skips.drawing  # an engine with blocks does it
        for turn in range(turns):
            with phase("data"):
                batch = next(batches)
            if self.config:
                engine.mocte.annotate(batch["domain"], self.loader.domains)
            else:
                engine.skips.begin_pass(batch["domain"], self.loader.domains)
            with phase("forward"), drawing():
                output = engine(**self.forward.inputs(batch["input_ids"].to(engine.device)))
                loss = self.forward.loss(output, batch["labels"])
                total += loss.item() / turns
            if not turn:
                blocks, frozen = self._modes()  # after a birth before the first step, before a check after this one
            if turn == turns - 1:
                # Agreed before the last backward pass, so that no rank steps while another one stops.
                mine = [total, optimizer_bytes(self.engine), self.stop_asked, HEART.take_working_seconds()]
                with phase("agreement", waits=True):
                    told, loads = self._tell(mine)
                losses, sizes, stops, worked = told.T
                if not engine.skips.limit:
                    self.watch.require_finite("loss", losses.mean().item(), before + 1, self.loader.position)
            if not self.config:
                engine.skips.see(loss)
                if turn == turns - 1 and engine.skips.limit and not losses.isfinite().all():
                    loss = loss * math.nan  # DeepSpeed skips by gradients, and they may be finite where a loss is not
            with phase("backward"), drawing():
                engine.backward(loss)
            with phase("optimizer", waits=True):
                engine.step()
        if not self.config:
            engine.skips.look(engine)
        if engine.global_steps == before:
            return None, bool(stops.any())
        norm = engine.get_global_grad_norm()
        for what, value in (("loss", losses.mean()), ("gradient norm", norm)):
            if value is not None:
                self.watch.require_finite(what, float(value), engine.global_steps, self.loader.position)
        seconds = time.perf_counter() - started
        metrics = {
            "step": engine.global_steps,
            "tokens": engine.global_steps * t.batch_tokens,
            "loss": losses.mean().item(),
            "lr": float(rate),
            "grad_norm": float(norm) if norm is not None else None,
            "tokens_per_second": t.batch_tokens / seconds,
            "optimizer_bytes": int(sizes.sum()),
            "optimizer_bytes_by_rank": [int(size) for size in sizes.tolist()],
            **({"skipped_steps": engine.skipped_steps} if engine.skipped_steps else {}),
            **self._count_flops(blocks, frozen, loads, seconds),
            **(mode_counts(engine.mocte.blocks) if self.config else {}),
            **self.watch.facts(worked.tolist(), engine.global_steps % self.run.validate_every == 0),
        }
        return metrics, bool(stops.any())

    def _tell(self, mine: list[float]) -> tuple[Tensor, list[list[int]]]:
        """Numbers of every rank as (ranks, numbers), and the step's tokens by block and expert, once all are routed."""
        if self.config:
            return self.engine.mocte.passes.tell(mine)
        return stack_over_ranks(torch.tensor(mine, dtype=torch.float64), self.mesh.world), []

    def _modes(self) -> tuple[list[dict[str, Any]], int]:
        """Layer and modes of every block, and the frozen layers of the front."""
        if not self.config:
            return [], 0
        return block_modes(self.engine.mocte.blocks), self.engine.mocte.frozen_layers

    def _count_flops(
        self, blocks: list[dict[str, Any]], frozen: int, loads: list[list[int]], seconds: float
    ) -> dict[str, Any]:
        """Add a step to the ledger; what metrics.jsonl has of it: FLOPs, MFU if the peak is known, loads.

        Args:
            blocks: as the step found them, not as a check after it has left them.
            frozen: layers of the front, likewise.
            loads: tokens by block and expert.
            seconds: that the step took.
        """
        blocks = [{**block, "load": counts} for block, counts in zip(blocks, loads, strict=True)]
        sampled = bool(self.config) and self.engine.mocte.checks.samples_after(self.engine.global_steps - 1)
        tokens, context = self.run.training.batch_tokens, self.run.context
        self.ledger.step(self.sizes, tokens, context, self.config, blocks, frozen, sampled)
        found = {"flops": self.ledger.total, "expert_load": loads or None}
        if self.utilisation:
            found["mfu"] = self.utilisation.of_step(tokens, context, blocks, frozen, seconds)
        return found

    def _save(self, step: int) -> None:
        folder, started = self.out / "checkpoints", time.perf_counter()
        state = {
            "data_position": self.loader.position,
            **model_record(self.engine.module),
            "tokenizer": str(tokenizer_in(self.out.absolute())),
            "tokens": step * self.run.training.batch_tokens,
            "ledger": self.ledger.to_dict(),
        }
        if self.lock:
            self.lock.require_held()
        save(self.engine, folder, checkpoint_tag(step), state)
        self._saved = step
        self._prune(self.engine.global_steps)
        if self.rank == 0:
            write_json(self.out / "ledger.json", self.ledger.to_dict(), TOOL)
        self._event("save", checkpoint=checkpoint_tag(step), seconds=time.perf_counter() - started)
        self.telemetry.note()
        # Nobody stands in a step, which has a shorter limit, while rank 0 is still removing what is old.
        wait_for_all(self.mesh.world)

    def _mocte_event(self, event: dict[str, Any]) -> None:
        self.ledger.counted(event.get("flops", {}))
        self.telemetry.event(event)

    def _event(self, event: str, **facts: Any) -> None:
        step = self.engine.global_steps
        self.telemetry.event({"event": event, "step": step, "tokens": step * self.run.training.batch_tokens, **facts})

    def _ask_to_stop(self, _number: int, _frame: Any) -> None:
        self.stop_asked = True
