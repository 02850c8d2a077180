"""Seconds and bytes of one expert's largest tangent-kernel eigenvalue, and the measurement's share of training time."""

import argparse
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.options import require_at_least
from mocte_ds.benchmark.measure.parts import TimedPart, Work, parts_table
from mocte_ds.benchmark.measure.run_plan import RunPlan
from mocte_ds.benchmark.measure.share import Costs, add_share_arguments, shares, shares_text
from mocte_ds.trainability import top_eigenpair

FORMULAS = {
    "llama": "FLOPs of an expert 12 n d f + 2 n^2 (d + f) once, and 4 n d f + 4 n^2 f + 2 n^2 d an iteration, "
    "and 2 k^2 n d in iteration k; held 4 (3 d f + 5 n f + 2 n^2 + 2 i n d) beside the rows",
    "gpt2": "FLOPs of an expert 8 n d f + 2 n^2 (d + f) once, and 4 n d f + 2 n^2 f + 2 n^2 d an iteration, "
    "and 2 k^2 n d in iteration k; held 4 (2 d f + 4 n f + 2 n^2 + 2 i n d) beside the rows",
    "moved": "24 bytes a probe: eigenvalue, rows and gradient norm",
    "letters": "n rows, d features, f hidden units, i iterations",
}


@dataclass(frozen=True)
class ExpertSizes:
    """What the cost of a check's trainability depends on, on one rank."""

    d: int
    width: int
    """Hidden units."""
    rows: int
    """Of an expert."""
    experts: int
    """That the rank holds."""
    iterations: int
    style: Literal["llama", "gpt2"]
    """`llama`: gated, three matrices; `gpt2`: two matrices with biases."""

    @classmethod
    def of(cls, plan: RunPlan) -> "ExpertSizes":
        """Those of a run."""
        d, config = plan.sizes.hidden_size, plan.config
        layer = max(plan.sizes.layers, key=lambda layer: layer.ffn_width)
        style: Literal["llama", "gpt2"] = "llama" if layer.ffn == 3 * d * layer.ffn_width else "gpt2"
        width = layer.ffn_width // len(config.routers)
        if config.expert.kind == "lora":
            width = config.expert.width or max(1, width // config.num_experts)
        rows, iterations = config.freeze.rows, config.freeze.iterations
        return cls(d, width, rows, plan.local_experts, iterations, style)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of an expert; the defaults are those of launch/runs/llama-7b.yaml."""
    parser.add_argument("--d", type=int, default=4096, help="features (default: %(default)s)")
    parser.add_argument("--width", type=int, default=11008, help="hidden units of an expert (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="sampled tokens per expert (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=2, help="experts that are timed (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=20, help="largest number of products (default: %(default)s)")
    parser.add_argument("--style", choices=("llama", "gpt2"), default="llama", help="FFN (default: %(default)s)")
    add_share_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line.

    Raises:
        MocteError: sizes that make no sense or do not fit into memory.
    """
    for name in ("d", "width", "rows", "experts", "iterations"):
        require_at_least(args, name, 1)
    clock = Clock(args.device)
    sizes = ExpertSizes(args.d, args.width, args.rows, args.experts, args.iterations, args.style)
    memory = require_expert_memory(sizes, clock)
    costs = Costs(
        measure=lambda plan: measure_trainability(ExpertSizes.of(plan), clock, 3),
        work=lambda plan: trainability_work(ExpertSizes.of(plan)),
        same_sizes=lambda plan: replace(ExpertSizes.of(plan), experts=sizes.experts) == sizes,
    )
    parts = measure_trainability(sizes, clock, args.repeats)
    converged = measure_trainability(sizes, clock, args.repeats, None)["trainability"].seconds
    memory["peak_bytes"] = clock.peak_bytes()
    return {
        "benchmark": "trainability",
        "sizes": asdict(sizes),
        "memory": memory,
        "parts": {name: part.to_dict() for name, part in parts.items()},
        "seconds_per_expert": parts["trainability"].seconds / sizes.experts,
        "seconds_per_expert_until_converged": converged / sizes.experts,
        "formulas": {name: FORMULAS[name] for name in (sizes.style, "moved", "letters")},
        **shares(args, clock, costs, parts),
    }


def trainability_work(s: ExpertSizes) -> dict[str, Work]:
    """FLOPs, bytes and memory of all experts of a rank; see FORMULAS."""
    n, d, f = s.rows, s.d, s.width
    inputs = 2 if s.style == "llama" else 1
    # The closed form's forward and the module's own, to compare; X X^T; H H^T.
    once = 2 * 2.0 * n * d * f * (inputs + 1) + 2.0 * n * n * (d + f)
    # v W2; the Gram matrix with each gate; back through W2^T; H H^T v. The last: Rayleigh-Ritz over k vectors.
    product = 4.0 * n * d * f + inputs * 2.0 * n * n * f + 2.0 * n * n * d
    ritz = sum(2.0 * k * k * n * d for k in range(1, s.iterations + 1))
    flops = s.experts * (once + s.iterations * product + ritz)
    held = 4 * ((inputs + 1) * d * f + (inputs + 3) * n * f + 2 * n * n + 2 * s.iterations * n * d)
    return {"trainability": Work(flops, flops, 24 * s.experts, held)}


def require_expert_memory(sizes: ExpertSizes, clock: Clock) -> dict[str, int]:
    """Refuse sizes that do not fit; see :func:`mocte_ds.benchmark.measure.memory.require_memory`."""
    matrices = 3 if sizes.style == "llama" else 2
    weights = 2 * matrices * sizes.d * sizes.width + 8 * sizes.d * sizes.width  # bf16; one matrix in fp32 at birth
    rows = 4 * sizes.rows * sizes.d
    needed = trainability_work(sizes)["trainability"].held_bytes + weights + rows
    what = f"an expert of {sizes.d} x {sizes.width} on {sizes.rows} rows"
    return require_memory(needed, clock.device, what, "Give a smaller --width, --d or --rows.")


@torch.no_grad()
def measure_trainability(
    sizes: ExpertSizes, clock: Clock, repeats: int = 3, tolerance: float = 0.0
) -> dict[str, TimedPart]:
    """Time the eigenvalue of experts in bf16 on rows in fp32, as a check calls it; four experts at most, multiplied.

    Args:
        sizes: of the experts.
        clock: of the device.
        repeats: timed calls; the shortest counts.
        tolerance: of the eigenvalue; None: as in a check. 0 takes all iterations, whatever the spectrum of these
            invented rows: an upper bound, and what the FLOPs are counted for.
    """
    timed, seconds = min(sizes.experts, 4), 0.0
    options = {} if tolerance is None else {"tolerance": tolerance}
    torch.manual_seed(0)
    with tqdm(total=timed, desc="trainability", unit="expert", bar_format="{desc} {n}/{total} {elapsed}") as bar:
        for _ in range(timed):
            expert = _expert(sizes, clock.device)
            rows = torch.randn(sizes.rows, sizes.d, device=clock.device)
            value = partial(top_eigenpair, expert, rows, iterations=sizes.iterations, **options)
            seconds += clock.seconds(value, repeats)[0] * sizes.experts / timed
            bar.update()
    what = f"{sizes.experts} experts, all iterations" + (f", timed on {timed}" if timed < sizes.experts else "")
    return {"trainability": TimedPart(what, trainability_work(sizes)["trainability"], seconds, "device")}


def text(numbers: dict[str, Any]) -> str:
    """For people: a table of the parts, then the shares."""
    s = numbers["sizes"]
    each, converged = numbers["seconds_per_expert"], numbers["seconds_per_expert_until_converged"]
    lines = [
        f"{s['experts']} experts of {s['d']:,} x {s['width']:,} ({s['style']}) on {s['rows']:,} rows each, "
        f"{s['iterations']} iterations: {each:.3g} s an expert; {converged:.3g} s up to the tolerance of a check",
        parts_table(numbers["parts"]),
        shares_text(numbers),
    ]
    return "\n\n".join(lines)


def _expert(sizes: ExpertSizes, device: torch.device) -> nn.Module:
    """An FFN of transformers with the weights of a model's birth."""
    from transformers import GPT2Config, LlamaConfig
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    expert: nn.Module  # it reads these sizes only
    if sizes.style == "llama":
        expert = LlamaMLP(LlamaConfig(hidden_size=sizes.d, intermediate_size=sizes.width, num_attention_heads=1))
    else:
        expert = GPT2MLP(sizes.width, GPT2Config(n_embd=sizes.d, n_head=1, resid_pdrop=0.0))
    for parameter in expert.to(device, torch.bfloat16).parameters():
        nn.init.normal_(parameter, std=0.02)
    return expert
