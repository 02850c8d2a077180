"""Whole training steps: dense, MO-CTE by kind of routing and expert, and DeepSpeed's Switch, on the same model."""

import argparse
from typing import Any

import torch

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.options import add_sizes, require_at_least, take_usual
from mocte_ds.benchmark.measure.step_arms import StepSizes
from mocte_ds.benchmark.measure.step_run import PHASES, run_rank
from mocte_ds.cli import seconds
from mocte_ds.config import MocteConfig
from mocte_ds.dist.processes import run_ranks
from mocte_ds.errors import MocteError
from mocte_ds.flops.model_sizes import model_sizes
from mocte_ds.text_table import brief, text_table
from mocte_ds.training.model import make_model
from mocte_ds.training.presets import PRESETS

WORDS = {
    "dense": "dense model, plain DeepSpeed",
    "warmup": "MO-CTE before emergence",
    "hash": "MO-CTE, one bank by hash",
    "token": "MO-CTE, one bank by clusters (token)",
    "banks": "MO-CTE, two banks by hash",
    "lora": "MO-CTE, dense FFN and narrow experts (lora)",
    "deepspeed": "DeepSpeed MoE as Switch, capacity 1.25",
}
# The quickstart's step on a CPU; all engines in 80 GB of a GPU.
_DEFAULTS: dict[str, dict[str, int | str]] = {
    "cpu": {"preset": "quickstart", "context": 256, "micro_batch": 16, "experts": 4, "ranks": 2, "ep": 2},
    "cuda": {"preset": "gpt-140m", "context": 1024, "micro_batch": 8, "experts": 8, "ranks": 1, "ep": 1},
}
_NUMBERS = {
    "context": "tokens per sequence",
    "micro_batch": "sequences per rank and step",
    "experts": "experts of a bank, all ranks together",
    "ranks": "processes",
    "ep": "ranks that share the experts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the step; those without a number here depend on the device."""
    usual = "; ".join(f"{kind} {sizes['preset']}" for kind, sizes in _DEFAULTS.items())
    parser.add_argument("--preset", choices=sorted(PRESETS), help=f"size of the model (default: {usual})")
    add_sizes(parser, _NUMBERS, _DEFAULTS)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="stage of ZeRO (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="data type (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="turns of all arms (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=seconds, default=900.0, help="seconds for the processes (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line.

    Raises:
        MocteError: sizes that make no sense or do not fit into memory, or processes that failed or took too long.
    """
    clock = Clock(args.device)
    kind = clock.device.type
    take_usual(args, _DEFAULTS[kind])
    for name in (*_NUMBERS, "repeats"):
        require_at_least(args, name, 1)
    sizes = StepSizes(**{name: getattr(args, name) for name in StepSizes.__dataclass_fields__})
    # Refuses a number of experts or ranks that makes no sense.
    MocteConfig.from_dict({"modules": "auto", "num_experts": sizes.experts, "ep_size": sizes.ep}, sizes.ranks)
    if sizes.context > sizes.model.max_positions:
        raise MocteError(f"--context {sizes.context}: {sizes.preset} has {sizes.model.max_positions} positions.")
    memory = require_memory(
        _bytes(sizes, kind), clock.device, f"{len(WORDS)} engines of {sizes.preset}", "Give a smaller --preset."
    )
    found = run_ranks(run_rank, sizes.ranks, sizes, kind, args.repeats, timeout=args.time_limit, device=kind)[0]
    tokens = sizes.ranks * sizes.micro_batch * sizes.context
    for arm in found["arms"].values():
        arm["tokens_per_second"] = tokens / arm["seconds"]
    return {"benchmark": "step", "sizes": sizes.to_dict(), "memory": memory, "words": WORDS, **found}


def text(numbers: dict[str, Any]) -> str:
    """For people: a row per arm."""
    s = numbers["sizes"]
    rows = [
        [
            WORDS[name],
            *(brief(1000 * arm["phases"][phase]) for phase in PHASES),
            brief(1000 * arm["seconds"]),
            f"{arm['tokens_per_second']:,.0f}",
            brief(arm["over_dense"]),
            brief(arm["load"]),
        ]
        for name, arm in numbers["arms"].items()
    ]
    head = ["step", *(f"{phase} ms" for phase in PHASES), "ms", "tokens/s", "x dense", "load"]
    return (
        f"{s['preset']}, {s['micro_batch']} x {s['context']:,} tokens per rank, {s['ranks']} ranks, {s['experts']} "
        f"experts over {s['ep']}, ZeRO-{s['stage']}, {s['dtype']}, {numbers['device']}, {numbers['threads']} threads "
        "per rank; medians; x dense: median of the ratios of each turn; load: largest over mean tokens of an expert\n\n"
        + text_table(head, rows, left=("step",))
    )


def _bytes(sizes: StepSizes, device: str) -> float:
    """Upper bound for the engines of all ranks on one device: two without experts, and one step's activations."""
    with torch.device("meta"):
        model = model_sizes(make_model(sizes.model, weights=False))
    dense, config = sizes.model.num_params(), sizes.model.config
    experts = sum(layer.ffn for layer in model.layers) * sizes.experts / sizes.ep
    logits = 14 * sizes.micro_batch * sizes.context * sizes.model.vocab_size
    inside = 64 * config.hidden_size * config.num_hidden_layers * sizes.micro_batch * sizes.context
    engines = 16 * (len(WORDS) * dense + (len(WORDS) - 2) * experts)
    return (engines + logits + inside) * (sizes.ranks if device == "cpu" else 1)
