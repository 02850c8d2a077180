"""The training loop, top to bottom: data, model, engine, steps, validation, checkpoints."""

import random
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

import mocte_ds
from mocte_ds.config import MocteConfig
from mocte_ds.data import BlendedLoader, Manifest, Tokenizer, validation_batches
from mocte_ds.dist.collectives import gather_objects, gather_rows, world
from mocte_ds.errors import NonFiniteLoss
from mocte_ds.models import Decoder
from mocte_ds.training.ledger import Ledger
from mocte_ds.training.run_config import RunConfig
from mocte_ds.training.run_folder import prune_checkpoints, require_same_run, resume_folder, versions, write_json
from mocte_ds.training.telemetry import Telemetry
from mocte_ds.training.validation import Validation


class Trainer:
    """One run on this rank."""

    def __init__(self, run: RunConfig, out: Path, resume: str) -> None:
        """Set everything up; see launch/pretrain.py for the arguments."""
        self.run, self.out = run, out
        self.rank, self.world_size = world()
        prepared = Path(run.data.prepared)
        self.manifest = Manifest.read(prepared)
        tokenizer = Tokenizer(prepared / "tokenizer.model")
        settings = run.resolve(self.world_size, tokenizer.eod_id, tokenizer.vocab_size)
        self.config = MocteConfig.from_dict(settings["mocte"]) if "mocte" in settings else None
        checkpoints = resume_folder(out, resume)
        t = run.training
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(t.seed)
        self.engine = _engine(Decoder(run.model), settings)
        self.loader = BlendedLoader(
            prepared,
            "train",
            run.context,
            t.batch_tokens // run.context,
            self.rank,
            self.world_size,
            t.micro_batch,
            t.seed,
            run.data.weights,
        )
        self.validation = Validation(
            validation_batches(prepared, run.context, run.evaluation.sequences_per_domain), t.micro_batch
        )
        self.ledger, self.stop_asked = Ledger(), False
        if checkpoints:
            self._resume(checkpoints)
        else:
            # Every rank draws other numbers from here on; the weights above had to be the same.
            for seeded in (random.seed, np.random.seed, torch.manual_seed):
                seeded(t.seed + 1000 + self.rank)
        if self.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "run.json", self._facts(settings))
        monitor = getattr(self.engine, "monitor", None)
        self.telemetry = Telemetry(out, self.rank == 0, t.steps, self.engine.global_steps, monitor)
        if checkpoints:
            self._event("resume", checkpoint=str(checkpoints), position=self.loader.position)
        if self.config:
            self.engine.mocte.on_event(self._mocte_event)

    def train(self, stop_after: int | None) -> bool:
        """Train to the end of the budget, or up to ``stop_after``.

        Returns:
            True if the budget is done.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; the optimizer has not seen it.
        """
        t = self.run.training
        last = min(t.steps, stop_after or t.steps)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        batches = iter(self.loader)
        started = time.perf_counter()
        while self.engine.global_steps < last:
            metrics = self._step(batches)
            step = metrics["step"]
            if step % self.run.validate_every == 0 or step == t.steps:
                metrics["validation"] = self.validation.losses(self.engine)
                self.ledger.validate(self.run.model, self.validation.tokens, self.run.context)
            now = time.perf_counter()
            metrics["seconds"], started = now - started, now
            self.telemetry.step(metrics)
            stopping = any(gather_objects(self.stop_asked))
            if step % self.run.checkpoint_every == 0 or step == last or stopping:
                self._save(step)
                started = time.perf_counter()
            if stopping:
                break
        self.telemetry.close()
        return self.engine.global_steps >= t.steps

    def _step(self, batches: Any) -> dict[str, Any]:
        """One optimizer step and its line in metrics.jsonl."""
        engine, t = self.engine, self.run.training
        started, total = time.perf_counter(), 0.0
        turns = engine.gradient_accumulation_steps()
        for turn in range(turns):
            batch = next(batches)
            if self.config:
                engine.mocte.annotate(batch["domain"], self.loader.domains)
            loss = engine(input_ids=batch["input_ids"].to(engine.device), labels=batch["labels"].to(engine.device))
            total += loss.item() / turns
            if turn == turns - 1:
                everywhere = gather_rows(torch.tensor([[total, self._optimizer_bytes()]], dtype=torch.float64))
                mean = everywhere[:, 0].mean().item()
                self._require_finite(mean)
            engine.backward(loss)
            engine.step()
        loads = engine.mocte.expert_load() if self.config else []
        blocks = []
        for handle, load in zip(engine.mocte.blocks if self.config else [], loads, strict=True):
            modes = [str(expert.mode) for expert in handle.experts]
            blocks.append({"mode": str(handle.mode), "experts": modes, "load": load})
        self.ledger.step(self.run.model, t.batch_tokens, self.run.context, self.config, blocks)
        norm = engine.get_global_grad_norm()
        return {
            "step": engine.global_steps,
            "tokens": engine.global_steps * t.batch_tokens,
            "loss": mean,
            "lr": engine.get_lr()[0],
            "grad_norm": float(norm) if norm is not None else None,
            "tokens_per_second": t.batch_tokens / (time.perf_counter() - started),
            "flops": self.ledger.total,
            "optimizer_bytes": [int(value) for value in everywhere[:, 1].tolist()],
            "expert_load": [block["load"] for block in blocks] or None,
        }

    def _require_finite(self, loss: float) -> None:
        if np.isfinite(loss):
            return
        step = self.engine.global_steps + 1
        last = self.out / "checkpoints" / "latest"
        good = last.read_text(encoding="utf-8").strip() if last.is_file() else "none yet"
        self.telemetry.close()
        raise NonFiniteLoss(
            f"the loss of step {step} is {loss} (sequences {self.loader.position - self.loader.batch_size} to "
            f"{self.loader.position - 1}). The run stops before the optimizer sees it; the last good checkpoint is {good} "
            f"in {self.out / 'checkpoints'}. Lower training.learning_rate, or look at that text, and start again: the run "
            "resumes."
        )

    def _optimizer_bytes(self) -> int:
        if self.config:
            return self.engine.mocte.optimizer_bytes()
        base = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        tensors = [p for group in base.param_groups for p in group["params"]]
        tensors += [v for values in base.state.values() for v in values.values() if torch.is_tensor(v)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _save(self, step: int) -> None:
        folder, started = self.out / "checkpoints", time.perf_counter()
        state = {
            "data_position": self.loader.position,
            "model": asdict(self.run.model),
            "tokenizer": str(Path(self.run.data.prepared) / "tokenizer.model"),
            "tokens": step * self.run.training.batch_tokens,
            "ledger": self.ledger.to_dict(),
            "identity": {**self.run.identity(), "data.manifest": self.manifest.sha256},
        }
        self.engine.save_checkpoint(str(folder), tag=f"step{step}", client_state=state)
        if self.rank == 0:
            prune_checkpoints(folder, self.run.training.keep_checkpoints)
            write_json(self.out / "ledger.json", self.ledger.to_dict())
        self._event("save", checkpoint=f"step{step}", seconds=time.perf_counter() - started)

    def _resume(self, folder: Path) -> None:
        _, client = self.engine.load_checkpoint(str(folder))
        require_same_run(self.run, self.manifest.sha256, client, folder)
        self.loader.seek(client["data_position"])
        self.ledger.load(client["ledger"])

    def _mocte_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "check":
            self.ledger.check(self.run.model, self.config, event)
        self.telemetry.event(event)

    def _event(self, name: str, **facts: Any) -> None:
        step = self.engine.global_steps
        self.telemetry.event({"event": name, "step": step, "tokens": step * self.run.training.batch_tokens, **facts})

    def _facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "command": " ".join(sys.argv),
            "world_size": self.world_size,
            "device": get_accelerator().device_name(),
            "model": asdict(self.run.model),
            "parameters": self.run.model.num_params(),
            "data": {**asdict(self.run.data), "manifest_sha256": self.manifest.sha256, "domains": self.manifest.domains},
            "training": {**asdict(self.run.training), "context": self.run.context, "warmup_steps": self.run.warmup_steps},
            "evaluation": asdict(self.run.evaluation),
            "deepspeed": {**settings, **({"mocte": self.config.to_dict()} if self.config else {})},
            "versions": versions(),
        }

    def _ask_to_stop(self, _number: int, _frame: Any) -> None:
        self.stop_asked = True


def _engine(model: Decoder, settings: dict[str, Any]) -> Any:
    """An engine with blocks, or DeepSpeed's own for a dense run."""
    if "mocte" in settings:
        return mocte_ds.initialize(model=model, config=settings)[0]
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]
