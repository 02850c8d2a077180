"""The share of training time that checks take: timed for a small run, projected for a large one."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.parts import TimedPart, Work
from mocte_ds.benchmark.measure.run_plan import RunPlan, read_plan
from mocte_ds.benchmark.measure.step import step_seconds
from mocte_ds.text_table import brief, percent, text_table

TARGET = 0.005
"""Largest share of training time that checks should take."""

MEASURED = "share = sum over parts of seconds / (steps_between_checks x step_seconds)"
PROJECTED = (
    "share = sum over parts of seconds x work(run) / work(measured) / training_seconds, training_seconds = "
    "steps_between_checks x step_flops / (ranks x gemm_flops_per_second)"
)
ON_ACCELERATOR = (
    "share = (sum over parts of seconds x scale + moved_bytes / network_bytes_per_second) / (steps_between_checks x "
    "step_flops / (ranks x accelerator_flops)); scale of a part: gemm fp32 here / accelerator_fp32 if it runs at half "
    "of gemm fp32 or faster here; else the larger one of this and copy_bytes_per_second here / accelerator_bandwidth; "
    "1 for what runs on the host; 0 for what runs in a thread beside training steps on an accelerator, as far as it is "
    "shorter than apply_after steps"
)


@dataclass(frozen=True)
class Costs:
    """How one benchmark measures the parts of a run's check, and what work they are."""

    measure: Callable[[RunPlan], dict[str, TimedPart]]
    """In this process, at the run's own sizes."""
    work: Callable[[RunPlan], dict[str, Work]]
    """Of one rank between two checks."""
    same_sizes: Callable[[RunPlan], bool]
    """Whether the parts at hand were measured at this run's sizes, so that only counts are scaled."""


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on runs, rates and timing that the benchmarks have in common."""
    parser.add_argument(
        "--small", default="quickstart", metavar="RUN", help="run whose step is timed here (default: %(default)s)"
    )
    parser.add_argument(
        "--large", default="llama-7b", metavar="RUN", help="run that is projected (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=64, help="ranks of the projected run (default: %(default)s)")
    parser.add_argument(
        "--accelerator-flops", type=float, default=4e14, help="sustained bf16 FLOP/s per rank (default: %(default)g)"
    )
    parser.add_argument(
        "--accelerator-fp32", type=float, default=4e13, help="sustained fp32 FLOP/s per rank (default: %(default)g)"
    )
    parser.add_argument(
        "--accelerator-bandwidth",
        type=float,
        default=2e12,
        help="bytes per second of its memory (default: %(default)g)",
    )
    parser.add_argument(
        "--network-bytes", type=float, default=1e10, help="bytes per second of an all-reduce (default: %(default)g)"
    )
    parser.add_argument(
        "--gemm-size", type=int, default=None, help="size of the matrix products that give the machine's rate"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each short part (default: %(default)s)")


def shares(args: argparse.Namespace, clock: Clock, costs: Costs, parts: dict[str, TimedPart]) -> dict[str, Any]:
    """The machine and both shares, for a benchmark's result.

    Args:
        args: with the options of :func:`add_share_arguments`.
        clock: of the device.
        costs: of the benchmark.
        parts: measured at the command's sizes; the projection scales them.
    """
    small, large = read_plan(args.small, 1), read_plan(args.large, args.ranks)
    machine = clock.machine(args.gemm_size)
    return {
        "machine": machine,
        "share": {
            "target": TARGET,
            "measured": measured_share(costs.measure(small), costs.work(small), small, step_seconds(small, clock)),
            "projected": {
                "same_sizes": costs.same_sizes(large),
                **projected_share(parts, costs.work(large), large, machine, args),
            },
        },
    }


def measured_share(
    parts: dict[str, TimedPart], work: dict[str, Work], plan: RunPlan, seconds_a_step: float
) -> dict[str, Any]:
    """Share of a run that was timed here, in one process that does the work of all ranks."""
    scaled = _recurring(parts, work)
    inputs = {**_inputs(plan), "step_seconds": seconds_a_step}
    return {"run": plan.path, "formula": MEASURED, "inputs": inputs, **_share(scaled, plan.interval * seconds_a_step)}


def projected_share(
    parts: dict[str, TimedPart], work: dict[str, Work], plan: RunPlan, machine: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Share of a run on many ranks, from parts measured here; no rank is faster than this machine.

    Both sides of the ratio use this machine's rates, so that it depends on the machine only as far as rates of
    different work do. ``on_accelerator`` states rates instead: there, what runs on the host weighs more.
    """
    scaled, rates = _recurring(parts, work), machine["gemm_flops_per_second"]
    between = plan.interval * plan.step_flops / plan.ranks
    flops = sum(part.work.flops for part in scaled.values())
    moved = sum(part.work.moved_bytes for part in scaled.values())
    spare = min(plan.config.apply_after, plan.interval - 1) * between / plan.interval / args.accelerator_flops
    beside = sum(part.seconds for part in scaled.values() if part.where == "beside")
    waits = max(0.0, 1.0 - spare / beside) if beside else 0.0
    scales = {name: waits if part.where == "beside" else _scale(part, machine, args) for name, part in scaled.items()}
    seconds = {name: part.seconds * scales[name] for name, part in scaled.items()}
    seconds["network"] = moved / args.network_bytes
    stated = {
        "accelerator_flops": args.accelerator_flops,
        "accelerator_fp32": args.accelerator_fp32,
        "accelerator_bandwidth": args.accelerator_bandwidth,
        "scale": scales,
        "network_bytes_per_second": args.network_bytes,
        "moved_bytes": moved,
    }
    inputs = {**_inputs(plan), "gemm_flops_per_second": rates[plan.dtype], "work_scale": _scales(parts, scaled)}
    return {
        "run": plan.path,
        "formula": PROJECTED,
        "inputs": inputs,
        **_share(scaled, between / rates[plan.dtype]),
        "flop_share": flops / between,
        "on_accelerator": {
            "formula": ON_ACCELERATOR,
            "inputs": stated,
            **_total(seconds, between / args.accelerator_flops),
        },
    }


def shares_text(numbers: dict[str, Any]) -> str:
    """Both shares for people, with everything that went into them."""
    share, machine = numbers["share"], numbers["machine"]
    rates = [f"{name} {brief(rate / 1e9)} GFLOP/s" for name, rate in machine["gemm_flops_per_second"].items()]
    rates.append(f"copies {brief(machine['copy_bytes_per_second'] / 1e9)} GB/s")
    lines = [f"machine: {machine['device']}, {machine['threads']} threads; matrix products {', '.join(rates)}"]
    measured, projected = share["measured"], share["projected"]
    views = [("timed here, one process", measured), ("projected, rates of this machine", projected)]
    views.append(("projected, stated rates", {"run": projected["run"], **projected["on_accelerator"]}))
    for name, view in views:
        rows = [[part.replace("_", " "), brief(seconds)] for part, seconds in view["seconds"].items()]
        rows += [["check", brief(view["check_seconds"])], ["training between checks", brief(view["training_seconds"])]]
        verdict = "at most" if view["share"] <= share["target"] else "over"
        lines += [
            f"\n{view['run']} ({name}): {percent(view['share'])} of training, {verdict} {percent(share['target'])}",
            text_table(["part", "seconds"], rows, left=("part",)),
            view["formula"],
            *[f"  {name} = {brief(value, 4)}" for name, value in view["inputs"].items()],
        ]
    if not projected["same_sizes"]:
        lines.append("The parts were not measured at the projected run's sizes: the projection is rough.")
    lines.append(f"FLOPs of the checks over FLOPs of training, projected: {percent(projected['flop_share'])}")
    return "\n".join(lines)


def _scale(part: TimedPart, machine: dict[str, Any], args: argparse.Namespace) -> float:
    """Seconds of a part on the accelerator over its seconds here; see ON_ACCELERATOR."""
    if part.where == "host":
        return 1.0
    here = machine["gemm_flops_per_second"]["fp32"]
    products, copies = here / args.accelerator_fp32, machine["copy_bytes_per_second"] / args.accelerator_bandwidth
    # A part far from the rate of products is bound by memory, as far as one can tell.
    return products if part.work.flops >= 0.5 * here * part.seconds else max(products, copies)


def _recurring(parts: dict[str, TimedPart], work: dict[str, Work]) -> dict[str, TimedPart]:
    """What happens at every check, scaled to the run's work."""
    return {name: part.for_work(work[name]) for name, part in parts.items() if part.every_check}


def _share(parts: dict[str, TimedPart], training: float) -> dict[str, Any]:
    return _total({name: part.seconds for name, part in parts.items()}, training)


def _total(seconds: dict[str, float], training: float) -> dict[str, Any]:
    check = sum(seconds.values())
    share = check / training
    facts = {"seconds": seconds, "check_seconds": check, "training_seconds": training, "share": share}
    return {**facts, "within_target": share <= TARGET}


def _scales(parts: dict[str, TimedPart], scaled: dict[str, TimedPart]) -> dict[str, float]:
    return {name: part.work.units / parts[name].work.units for name, part in scaled.items()}


def _inputs(plan: RunPlan) -> dict[str, Any]:
    return {
        "ranks": plan.ranks,
        "steps_between_checks": plan.interval,
        "check_every": plan.config.check_every,
        "sampling_steps": plan.window,
        "step_flops": plan.step_flops,
        "tokens_per_step": plan.tokens_per_step,
        "blocks": plan.blocks,
        "local_experts": plan.local_experts,
        "dtype": plan.dtype,
    }
