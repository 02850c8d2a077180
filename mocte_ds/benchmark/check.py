"""A whole check, spectrum, clusters, trainability and probe set together: its share of training time."""

import argparse
from dataclasses import asdict, replace
from typing import Any

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.parts import TimedPart, Work, parts_table
from mocte_ds.benchmark.measure.run_plan import RunPlan, read_plan
from mocte_ds.benchmark.measure.share import Costs, add_share_arguments, shares, shares_text
from mocte_ds.benchmark.measure.spectrum_work import SpectrumSizes, spectrum_work
from mocte_ds.benchmark.measure.step import forward_seconds
from mocte_ds.benchmark.spectrum import measure_spectrum, require_spectrum_memory
from mocte_ds.benchmark.trainability import (
    ExpertSizes,
    measure_trainability,
    require_expert_memory,
    trainability_work,
)
from mocte_ds.flops.ledger import forward_flops

_TIMED_EXPERTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All sizes are those of the two runs."""
    add_share_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line.

    Raises:
        MocteError: a run file that cannot be read, or sizes that do not fit into memory.
    """
    clock, plan = Clock(args.device), read_plan(args.large, args.ranks)
    spectrum = replace(SpectrumSizes.of(plan), clustered=plan.blocks)
    experts = replace(ExpertSizes.of(plan), experts=_TIMED_EXPERTS)
    memory = [require_spectrum_memory(spectrum, clock, "fp32"), require_expert_memory(experts, clock)]
    costs = Costs(
        measure=lambda plan: (
            _measure(SpectrumSizes.of(plan), ExpertSizes.of(plan), clock, 5) | _probe(plan, clock, timed=True)
        ),
        work=_work,
        same_sizes=lambda plan: True,
    )
    parts = _measure(spectrum, experts, clock, args.repeats) | _probe(plan, clock, timed=False)
    return {
        "benchmark": "check",
        "sizes": {"spectrum": asdict(spectrum), "trainability": asdict(experts)},
        "memory": max(memory, key=lambda m: m["estimated_bytes"]) | {"peak_bytes": clock.peak_bytes()},
        "parts": {name: part.to_dict() for name, part in parts.items()},
        **shares(args, clock, costs, parts),
    }


def text(numbers: dict[str, Any]) -> str:
    """For people: a table of the parts, then the shares."""
    return "\n\n".join([parts_table(numbers["parts"]), shares_text(numbers)])


def probe_sequences(plan: RunPlan) -> int:
    """Sequences of the probe set that one rank runs: its part of them, at least one (see ProbeSet.offer)."""
    config = plan.config
    wanted = config.probe_tokens or 4 * config.num_experts * config.freeze.rows
    return max(1, -(-min(-(-wanted // plan.context), plan.tokens_per_step // plan.context) // plan.ranks))


def probe_work(plan: RunPlan) -> dict[str, Work]:
    """One forward pass; at some checks one more for each block's rollback, and two for the conflict."""
    config = plan.config
    some = 1 / config.conflict_every if config.conflict_every else 0.0
    passes = 1 + 2 * some + plan.blocks * (1.0 if config.freeze.policy == "progress" else some)
    tokens = probe_sequences(plan) * plan.context
    flops = passes * tokens * forward_flops(plan.sizes, plan.context)
    return {"progress": Work(flops, flops, 0, 0)}


def _probe(plan: RunPlan, clock: Clock, timed: bool) -> dict[str, TimedPart]:
    """The passes over the probe set, timed or from FLOPs and this machine's rate; the Gram matrices not counted."""
    work = probe_work(plan)["progress"]
    what = f"forward passes over {probe_sequences(plan)} sequences"
    if timed:
        a_pass = probe_sequences(plan) * plan.context * forward_flops(plan.sizes, plan.context)
        seconds = forward_seconds(plan, clock, probe_sequences(plan)) * work.flops / a_pass
    else:
        seconds, what = work.flops / clock.gemm_rate(plan.dtype), f"{what}, from FLOPs"
    return {"progress": TimedPart(what, work, seconds, "device")}


def _measure(spectrum: SpectrumSizes, experts: ExpertSizes, clock: Clock, repeats: int) -> dict[str, TimedPart]:
    return measure_spectrum(spectrum, clock, repeats) | measure_trainability(experts, clock, repeats)


def _work(plan: RunPlan) -> dict[str, Work]:
    return spectrum_work(SpectrumSizes.of(plan)) | trainability_work(ExpertSizes.of(plan)) | probe_work(plan)
