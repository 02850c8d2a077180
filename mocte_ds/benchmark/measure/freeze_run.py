"""One rank of a small run whose experts are frozen in stages: bytes and seconds of its steps and of the freezing."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import mocte_ds
from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.freeze_plan import FreezeSizes
from mocte_ds.benchmark.measure.llama import next_token_loss
from mocte_ds.benchmark.measure.wire import Traffic, WireCounter
from mocte_ds.training.model import make_model

_PHASES = ("forward", "backward", "step")


def run_rank(sizes: FreezeSizes, device: str) -> dict[str, Any]:
    """The whole run on this rank: at each stop some experts are frozen, then steps are counted and timed.

    Args:
        sizes: of the run.
        device: `cpu` or `cuda`.

    Returns:
        "stops": for each entry of ``sizes.frozen`` what :meth:`_Rank.stop` found.
    """
    # Before DeepSpeed starts: its backend keeps functions of torch.distributed.
    with WireCounter() as wire:
        rank = _Rank(sizes, Clock(device), wire)
        return {"stops": [rank.stop(percent) for percent in sizes.frozen]}


class _Rank:
    """An engine, and what is measured of it."""

    def __init__(self, sizes: FreezeSizes, clock: Clock, wire: WireCounter) -> None:
        """Start; all blocks emerge before the first step."""
        self.sizes, self.clock, self.wire = sizes, clock, wire
        torch.manual_seed(0)
        self.engine, *_ = mocte_ds.initialize(model=make_model(sizes.model), config=sizes.config())
        wire.name_group(self.engine.mesh.expert.group, "token")
        wire.name_group(self.engine.mesh.expert_data.group, "expert")
        for handle in self.engine.mocte.blocks:
            self.engine.mocte.emerge(block=handle.index)
        self.data = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.frozen = 0

    def stop(self, percent: int) -> dict[str, Any]:
        """Freeze up to ``percent`` of every block's experts, then warm up, count one step and time some.

        Returns:
            "freezing": seconds, traffic and memory of each call; "bytes" and "traffic" of one step; "load": (blocks,
            experts) tokens of that step; "leaving": tokens of this rank in it that are handed over to the exchange, all
            blocks together; "seconds" of each phase.
        """
        freezing = self._freeze(percent)
        self._step()
        counted = self._counted_step()
        times = [self._step() for _ in range(self.sizes.steps)]
        seconds = {}
        for phase, found in zip(_PHASES, zip(*times, strict=True), strict=True):
            wall, processor = zip(*found, strict=True)
            seconds[phase] = {"shortest": min(wall), "median": statistics.median(wall), "processor": min(processor)}
        return {"freezing": freezing, **counted, "seconds": seconds}

    def _freeze(self, percent: int) -> list[dict[str, Any]]:
        mocte, calls = self.engine.mocte, []
        wanted = self.sizes.frozen_experts(percent)
        for expert in wanted[self.frozen :]:
            for handle in mocte.blocks:
                self.wire.take()
                memory = _Memory(self.clock)
                started = time.perf_counter()
                mocte.freeze(block=handle.index, expert=expert)
                self.clock.synchronise()
                seconds = time.perf_counter() - started
                calls.append({"seconds": seconds, "extra_bytes": memory.extra(), "traffic": _plain(self.wire.take())})
        self.frozen = len(wanted)
        return calls

    def _counted_step(self) -> dict[str, Any]:
        """One step with its bytes; looking at them takes time, so it is not timed."""
        self.engine.mocte.expert_load()
        self.wire.take()
        bytes_found: dict[str, int] = {}

        def look() -> None:
            held = self.engine.optimizer.held_gradients()
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
            bytes_found.update(gradients=sum(t.nbytes for t in held), gradients_held=sum(storages.values()))

        with _largest_gradients(self.engine.module) as largest:
            self._step(look)
        traffic = _plain(self.wire.take())
        bytes_found.update(optimizer=self.engine.mocte.optimizer_bytes(), gradients_in_backward=largest[0])
        load = self.engine.mocte.expert_load()
        return {"bytes": bytes_found, "traffic": traffic, "load": load, "leaving": self._leaving()}

    def _leaving(self) -> int:
        """Tokens of this rank in the last step that were handed over to the exchange, all blocks together."""
        mine, leaving = self.engine.mesh.expert.rank, 0
        for handle in self.engine.mocte.blocks if self.sizes.ep > 1 else []:
            (bank,) = handle.block.banks
            layer = bank.deepspeed_moe
            by_rank = layer.exp_counts.view(self.sizes.ep, -1).sum(1)
            leaving += int(by_rank.sum()) - (0 if layer.early is None else int(by_rank[mine]))
        return leaving

    def _step(self, before_optimizer: Callable[[], None] | None = None) -> list[tuple[float, float]]:
        """A step on random tokens.

        Returns:
            Seconds on the wall and of the processor of forward pass, backward pass (with reductions) and optimizer.
        """
        shape = (self.sizes.micro_batch, self.sizes.context + 1)
        ids = torch.randint(self.sizes.vocab, shape, generator=self.data).to(self.engine.device)
        times = [self._now()]
        loss = next_token_loss(self.engine, ids)
        times.append(self._now())
        self.engine.backward(loss)
        times.append(self._now())
        if before_optimizer is not None:
            before_optimizer()
        self.engine.step()
        times.append(self._now())
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times)]

    def _now(self) -> tuple[float, float]:
        self.clock.synchronise()
        return time.perf_counter(), time.process_time()


class _Memory:
    """Largest memory of a CUDA device beyond what was there at the start; a CPU does not tell."""

    def __init__(self, clock: Clock) -> None:
        self._device = clock.device
        self._before = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def extra(self) -> int | None:
        """Bytes; None on a CPU."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before


@contextmanager
def _largest_gradients(module: nn.Module) -> Iterator[list[int]]:
    """One number: the most bytes that the parameters' gradients had together at any moment of the backward pass."""
    parameters, largest = list(module.parameters()), [0]

    def look(_: nn.Parameter) -> None:
        there = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        largest[0] = max(largest[0], there)

    hooks = [p.register_post_accumulate_grad_hook(look) for p in parameters if p.requires_grad]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def _plain(traffic: dict[str, Traffic]) -> dict[str, dict[str, float]]:
    return {kind: asdict(found) for kind, found in traffic.items()}
