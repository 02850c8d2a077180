"""Times training steps of several engines in turns, on the ranks that share the work."""

import os
import statistics
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mocte_ds.benchmark.measure.clock import Clock, median_ratio
from mocte_ds.benchmark.measure.step_arms import Arm, StepSizes, make_arms
from mocte_ds.dist.collectives import wait_for_all
from mocte_ds.dist.mesh import mesh_of_processes

PHASES = ("forward", "backward", "optimizer")
_WARM = 3
"""Steps before the clock: kernels are chosen, memory is touched, and features are sampled for the emergence."""


def run_rank(sizes: StepSizes, device: str, repeats: int) -> dict[str, Any]:
    """Time a step of every arm once a turn, so that other work on the machine falls on all of them.

    Args:
        sizes: of the step.
        device: `cpu` or `cuda`.
        repeats: turns that count.

    Returns:
        "arms": for each the medians of its seconds, of its phases' and of its ratio to `dense` in the same turn, and
        "load": largest over mean tokens of an expert, the mean over blocks, or None; what the device is.
    """
    arms = make_arms(sizes)
    world = mesh_of_processes().world
    clock, generator = Clock(device), torch.Generator().manual_seed(int(os.environ["RANK"]))
    shape = (sizes.micro_batch, sizes.context + 1)

    def ids() -> Tensor:
        return torch.randint(sizes.model.vocab_size, shape, generator=generator).to(clock.device)

    seconds: dict[str, list[list[float]]] = {name: [] for name in arms}
    for turn in range(2 * _WARM + repeats):
        if turn == _WARM:
            _emerge(arms)
        for name, arm in arms.items():
            batch = ids()
            wait_for_all(world)
            taken = _step(arm, batch, clock)
            if turn >= 2 * _WARM:
                seconds[name].append(taken)
    dense = [sum(phases) for phases in seconds["dense"]]
    return {
        "arms": {name: {**_summary(values, dense), "load": _load(arms[name])} for name, values in seconds.items()},
        "device": clock.name(),
        "threads": torch.get_num_threads(),
    }


def _emerge(arms: dict[str, Arm]) -> None:
    """Let the experts of all arms of ours be born, but for the one that shows what the time before costs."""
    for name, arm in arms.items():
        if name != "warmup" and hasattr(arm.engine, "mocte"):
            for handle in arm.engine.mocte.blocks:
                arm.engine.mocte.emerge(block=handle.index)


def _step(arm: Arm, ids: Tensor, clock: Clock) -> list[float]:
    """A step; seconds of each of PHASES."""
    times = [clock.now()]
    loss = arm.loss(ids)
    times.append(clock.now())
    arm.engine.backward(loss)
    times.append(clock.now())
    arm.engine.step()
    times.append(clock.now())
    return [later - earlier for earlier, later in pairwise(times)]


def _summary(values: list[list[float]], dense: list[float]) -> dict[str, Any]:
    totals = [sum(phases) for phases in values]
    return {
        "seconds": statistics.median(totals),
        "over_dense": median_ratio(totals, dense),
        "phases": dict(zip(PHASES, map(statistics.median, zip(*values, strict=True)), strict=True)),
    }


def _load(arm: Arm) -> float | None:
    loads = arm.loads()
    if not loads or not any(map(any, loads)):
        return None
    return statistics.fmean(max(row) * len(row) / sum(row) for row in loads if any(row))
