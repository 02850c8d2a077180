"""Processes that save, load, reshape and export the checkpoint of a small run: seconds and memory of each."""

import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mocte_ds
from mocte_ds.base_model import base_facts
from mocte_ds.benchmark.measure.disk import forget
from mocte_ds.benchmark.measure.llama import llama, next_token_loss
from mocte_ds.benchmark.measure.memory import Peak
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.convert.hf.export import export
from mocte_ds.dist.collectives import from_rank_zero, wait_for_all
from mocte_ds.training.model import TransformersModel, make_model

CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer.model"
_MOST_STEPS = 1000  # beside one save


@dataclass(frozen=True)
class CheckpointSizes:
    """A small run, all of whose layers have experts."""

    d: int
    width: int
    """Hidden units of an expert."""
    layers: int
    experts: int
    """Of a block."""
    ep: int
    ranks: int
    micro_batch: int
    context: int
    dtype: str
    repeats: int
    vocab: int = 1024

    @property
    def model(self) -> TransformersModel:
        """The model without experts."""
        return llama(self.vocab, self.d, self.width, self.layers, self.context)

    @property
    def parameters(self) -> int:
        """That train."""
        return self.model.num_params() + (self.experts - 1) * self.dormant

    @property
    def dormant(self) -> int:
        """Of the FFNs that experts stand in for."""
        return self.layers * 3 * self.d * self.width

    @property
    def estimated_bytes(self) -> int:
        """Of a checkpoint: weights, and fp32 weights and two moments of those that train."""
        width = 2 if self.dtype == "bf16" else 4
        return (width + 12) * self.parameters

    def config(self, asynchronous: bool) -> dict[str, Any]:
        """The DeepSpeed config; blocks change by hand only, and their router is one of stock Mixtral."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "bf16": {"enabled": self.dtype == "bf16"},
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "mocte": {
                "modules": "model.layers.*.mlp",
                "num_experts": self.experts,
                "ep_size": self.ep,
                "auto": False,
                "router": {"kind": "random"},
                "checkpoint": {"async_save": asynchronous},
            },
        }


class StopWatch:
    """Seconds of what runs within it, and of the processor, threads included."""

    def __init__(self) -> None:
        self._start_up, self._started, self._worked = time.process_time(), 0.0, 0.0
        self._times, self._cpu = list[float](), list[float]()

    def __enter__(self) -> None:
        self._started, self._worked = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self._times.append(time.perf_counter() - self._started)
        self._cpu.append(time.process_time() - self._worked)

    def to_dict(self) -> dict[str, Any]:
        """Both, of each time; and what the process had worked before, on imports."""
        return {"seconds": self._times, "cpu_seconds": self._cpu, "start_up_seconds": self._start_up}


class Run:
    """An engine of one rank."""

    def __init__(self, sizes: CheckpointSizes, asynchronous: bool = False) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        self.engine, *_ = mocte_ds.initialize(model=make_model(sizes.model), config=sizes.config(asynchronous))
        self.data = torch.Generator().manual_seed(int(os.environ["RANK"]))

    def step(self) -> float:
        """Seconds of a step on random tokens."""
        shape = (self.sizes.micro_batch, self.sizes.context + 1)
        ids = torch.randint(self.sizes.vocab, shape, generator=self.data).to(self.engine.device)
        started = time.perf_counter()
        self.engine.backward(next_token_loss(self.engine, ids))
        self.engine.step()
        return time.perf_counter() - started

    def emerge(self) -> None:
        """Let all blocks emerge and every moment exist."""
        for handle in self.engine.mocte.blocks:
            self.engine.mocte.emerge(block=handle.index)
        self.step()


def save(sizes: CheckpointSizes, folder: str, asynchronous: bool) -> dict[str, Any]:
    """Save some times (collective); the last checkpoint stays.

    Returns:
        "saves": of each the "seconds" until it was whole, those "in_step" that the call took, and "beside", seconds of
        the steps meanwhile; "step": seconds of steps without a save; memory beyond that of the training.
    """
    run, root = Run(sizes, asynchronous), Path(folder) / CHECKPOINTS
    world = run.engine.mesh.world
    run.emerge()
    steps = [run.step() for _ in range(5)]
    saves: list[dict[str, Any]] = []
    peak = Peak()
    for number in range(sizes.repeats):
        tag = f"step{number}"
        wait_for_all(world)  # all start at once
        started = time.perf_counter()
        client = {"base": base_facts(run.engine.module), "tokenizer": str(Path(folder) / TOKENIZER), "tokens": 0}
        run.engine.save_checkpoint(str(root), tag, client_state=client)
        in_step = time.perf_counter() - started
        beside: list[float] = []
        while len(beside) < _MOST_STEPS and not from_rank_zero((root / tag).is_dir(), world):
            beside.append(run.step())
        run.engine.wait_for_checkpoint()
        saves.append({"seconds": time.perf_counter() - started, "in_step": in_step, "beside": beside})
        if from_rank_zero(number, world) and int(os.environ["RANK"]) == 0:
            shutil.rmtree(root / f"step{number - 1}")
        wait_for_all(world)
    return {"saves": saves, "step": statistics.median(steps), **peak.to_dict()}


def load(sizes: CheckpointSizes, folder: str) -> dict[str, Any]:
    """Load into a fresh engine (collective): seconds, and memory beyond that of the engine."""
    run, root, times = Run(sizes), Path(folder) / CHECKPOINTS, []
    world = run.engine.mesh.world
    peak = Peak()
    for _ in range(sizes.repeats):
        forget(find_tag(root))
        wait_for_all(world)  # all start at once
        started = time.perf_counter()
        run.engine.load_checkpoint(str(root))
        times.append(time.perf_counter() - started)
    return {"seconds": times, **peak.to_dict()}


def reshape_once(sizes: CheckpointSizes, folder: str) -> dict[str, Any]:
    """Bring the checkpoint to one rank: seconds and memory; for one process."""
    root, out, watch = Path(folder) / CHECKPOINTS, Path(folder) / "reshaped", StopWatch()
    peak = Peak()
    for _ in range(sizes.repeats):
        shutil.rmtree(out, ignore_errors=True)
        forget(find_tag(root))
        with watch:
            facts = reshape(root, out, 1, 1)
    shutil.rmtree(out)
    return {**watch.to_dict(), "bytes": facts["bytes"], **peak.to_dict()}


def export_once(sizes: CheckpointSizes, folder: str) -> dict[str, Any]:
    """Export to Hugging Face format, compared as always: seconds and memory; for one process."""
    from transformers import LlamaForCausalLM, MixtralForCausalLM  # noqa: F401  what is imported counts before

    root, out, watch = Path(folder) / CHECKPOINTS, Path(folder) / "export", StopWatch()
    peak = Peak()
    for _ in range(sizes.repeats):
        forget(find_tag(root))
        with watch:
            facts = export(root, out, sizes.dtype)
    shutil.rmtree(out)
    return {
        **watch.to_dict(),
        "bytes": facts["checkpoint_bytes"],
        "architecture": facts["architecture"],
        **peak.to_dict(),
    }
