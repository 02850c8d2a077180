"""Layouts of a run that fit a number of GPUs, best first, and how its time changes with their number."""

from dataclasses import asdict, dataclass
from typing import Any

from mocte_ds.config import divisors
from mocte_ds.deepspeed_settings import tensor_ranks
from mocte_ds.errors import ConfigError
from mocte_ds.plan.memory import PHASES, Layout, Task, checkpoint, host_memory, memory
from mocte_ds.plan.parameters import count_parameters
from mocte_ds.plan.speed import Hardware, save_seconds, speed
from mocte_ds.training.run_config import RunConfig

ROOM = 0.95
"""Share of a GPU's memory that a plan may fill: allocators need some of it for pieces that do not fit together."""
MANY = (8, 16, 32, 64, 128, 256, 512, 1024)
_SHOWN = 8


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    gpus: int
    per_host: int
    memory: float
    """Bytes of a GPU."""
    hardware: Hardware


def task_of(run: RunConfig) -> Task:
    """What the plan needs to know of a run file."""
    parameters, sizes, config = count_parameters(run)
    half = any((run.deepspeed.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16"))
    zero = run.deepspeed.get("zero_optimization") or {}
    asked = zero.get("reduce_bucket_size")
    bucket = int(asked) if isinstance(asked, int | float) else 500_000_000  # DeepSpeed's own
    return Task(parameters, sizes, config, run.context, run.model.vocab_size, 2 if half else 4, bucket)


def layout_of(run: RunConfig, ranks: int) -> Layout:
    """The layout that a run file asks for.

    Raises:
        ConfigError: its ep_size or micro-batch does not divide what they must.
    """
    block = run.deepspeed.get("mocte") or {}
    ep_size, experts = int(block.get("ep_size", 1)), int(block.get("num_experts", 1))
    if ranks % ep_size or experts % ep_size:
        raise ConfigError(f"mocte.ep_size = {ep_size} must divide the {ranks} ranks and the {experts} experts.")
    run.resolve(ranks, 0, run.model.vocab_size)
    stage = (run.deepspeed.get("zero_optimization") or {}).get("stage", 0)
    tensor = tensor_ranks(run.deepspeed)
    passes = run.training.batch_tokens * tensor // (ranks * run.training.micro_batch * run.context)
    return Layout(ranks, ep_size, stage, run.training.micro_batch, run.model.activation_checkpointing, passes, tensor)


def fitting(batch_tokens: int, task: Task, machine: Machine) -> list[dict[str, Any]]:
    """Layouts whose largest phase fits, by seconds per step after emergence.

    Args:
        batch_tokens: of the global batch.
        task: the run.
        machine: that it runs on.

    Returns:
        Each with its fields, "bytes" (of the largest phase), "phase" and "seconds".
    """
    sequences = batch_tokens // task.context
    experts = task.config.num_experts if task.config else 1
    found = []
    for ep_size in divisors(experts):
        if machine.gpus % ep_size or sequences % machine.gpus:
            continue
        for stage in (1, 2, 3):
            for micro in divisors(sequences // machine.gpus):
                for recompute in (False, True):
                    layout = Layout(machine.gpus, ep_size, stage, micro, recompute, sequences // machine.gpus // micro)
                    phase, most = largest(task, layout)
                    if most > ROOM * machine.memory:
                        continue
                    step = speed(task, layout, machine.hardware, machine.per_host, batch_tokens, True)
                    found.append({**asdict(layout), "bytes": most, "phase": phase, "seconds": step.step})
    # Of equally fast ones the simplest: a lower stage, then less memory.
    return sorted(found, key=lambda one: (round(one["seconds"], 4), one["stage"], one["bytes"]))


def largest(task: Task, layout: Layout) -> tuple[str, float]:
    """The phase that takes most, and its bytes."""
    sums = {phase: memory(task, layout, phase)["sum"] for phase in PHASES}
    phase = max(sums, key=lambda name: sums[name])
    return phase, sums[phase]


def plan(run: RunConfig, machine: Machine) -> dict[str, Any]:
    """Everything that tools/plan.py shows, in bytes, seconds and FLOPs.

    Raises:
        ConfigError: the run file does not fit the number of GPUs.
    """
    task, layout = task_of(run), layout_of(run, machine.gpus)
    if layout.tensor > 1:
        raise ConfigError(
            f"deepspeed.tensor_parallel.autotp_size = {layout.tensor}: times with tensor parallelism are not "
            "planned; plan with --set deepspeed.tensor_parallel=null."
        )
    batch, p = run.training.batch_tokens, task.parameters
    best = fitting(batch, task, machine)
    phases = {phase: memory(task, layout, phase) for phase in PHASES}
    steps = {
        name: speed(task, layout, machine.hardware, machine.per_host, batch, born)
        for name, born in (("warm-up", False), ("after", True))
    }
    after = steps["after"]
    return {
        "parameters": {"total": p.total, "active": p.active, **asdict(p)},
        "layout": asdict(layout),
        "gpu_memory": machine.memory,
        "phases": phases,
        "fits": max(phase["sum"] for phase in phases.values()) <= ROOM * machine.memory,
        "host_memory_at_start": host_memory(task, layout, machine.per_host),
        "checkpoint": {"warm-up": checkpoint(task, False), "after": checkpoint(task, True)},
        "save_seconds": save_seconds(checkpoint(task, True), machine.hardware),
        "flops_per_token": {name: step.flops_per_token for name, step in steps.items()},
        "wire": {name: step.wire for name, step in steps.items()},
        "seconds_per_step": {name: asdict(step) | {"step": step.step} for name, step in steps.items()},
        "days": after.step * run.training.steps / 86400,
        "tokens": batch * run.training.steps,
        "layouts": best[:_SHOWN],
        "layouts_that_fit": len(best),
        "growth": growth(run, task, machine),
    }


def growth(run: RunConfig, task: Task, machine: Machine) -> list[dict[str, Any]]:
    """The run on other numbers of GPUs, each with its fastest layout that fits.

    Where a batch has fewer sequences than there are GPUs it is taken to grow to one for each.

    Returns:
        For each number "gpus", "batch_tokens", "best" (as of :func:`fitting`, or None), "days" for all tokens of the
        run, and "seconds_by_ep_size" of the fastest layout for each ep_size.
    """
    found = []
    for gpus in MANY:
        batch = max(run.training.batch_tokens, gpus * task.context)
        here = Machine(gpus, machine.per_host, machine.memory, machine.hardware)
        choices = fitting(batch, task, here)
        by_ep: dict[int, float] = {}
        for one in choices:
            by_ep.setdefault(one["ep_size"], one["seconds"])
        best = choices[0] if choices else None
        steps = run.training.batch_tokens * run.training.steps / batch
        days = best and best["seconds"] * steps / 86400
        found.append({"gpus": gpus, "batch_tokens": batch, "best": best, "days": days, "seconds_by_ep_size": by_ep})
    return found
