"""What freezing experts saves: bytes of optimizer, gradients and wire, and seconds, each beside what it should be."""

import argparse
from typing import Any

import torch

from mocte_ds.benchmark.measure.block_time import measure_block
from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.freeze_plan import FORMULAS, FreezeSizes
from mocte_ds.benchmark.measure.freeze_run import run_rank
from mocte_ds.benchmark.measure.freeze_stops import stops, stops_text
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.options import add_sizes, require_at_least, take_usual
from mocte_ds.benchmark.measure.wire import RING
from mocte_ds.cli import seconds
from mocte_ds.config import MocteConfig
from mocte_ds.dist.processes import run_ranks
from mocte_ds.errors import MocteError
from mocte_ds.text_table import brief, percent

TARGET = 0.9
"""Smallest part of the weight gradient's time that a block with frozen experts should save."""

# Sizes at which matrix products dominate and the benchmark takes a minute or two.
_DEFAULTS = {
    "cpu": {"d": 512, "width": 1408, "layers": 2, "micro_batch": 8, "context": 512, "block_tokens": 4096, "ranks": 2},
    "cuda": {"d": 2048, "width": 5632, "layers": 4, "micro_batch": 8, "context": 2048, "block_tokens": 32768},
}
_SIZES = {
    "d": "features",
    "width": "hidden units of an expert",
    "layers": "layers of the model, each with a block",
    "micro_batch": "sequences per rank and step",
    "context": "tokens per sequence",
    "block_tokens": "tokens that the single block is timed on",
    "ranks": "processes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the run; those without a number here depend on the device."""
    add_sizes(parser, _SIZES, _DEFAULTS)
    parser.add_argument("--experts", type=int, default=4, help="experts of a block (default: %(default)s)")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share a block's experts (default: %(default)s)")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="stage of ZeRO (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="data type of the model (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=7, help="steps timed at every share (default: %(default)s)")
    parser.add_argument(
        "--frozen", default="0,25,50,75,100", help="shares of the experts in percent, ascending (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of the block (default: %(default)s)")
    parser.add_argument(
        "--gemm-size", type=int, default=None, help="size of the matrix products that give the machine's rate"
    )
    parser.add_argument(
        "--time-limit", type=seconds, default=600.0, help="seconds for the processes (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line.

    Raises:
        MocteError: sizes that make no sense or do not fit into memory, or processes that failed or took too long.
    """
    clock = Clock(args.device)
    kind = clock.device.type
    sizes, tokens = _read(args, kind)
    _require_memory(sizes, clock.device)
    block = measure_block(sizes, tokens, clock, args.repeats)
    if kind == "cuda":
        torch.cuda.empty_cache()  # the ranks use the same devices
    by_rank = run_ranks(run_rank, sizes.ranks, sizes, kind, timeout=args.time_limit, device=kind)
    return {
        "benchmark": "freeze",
        "sizes": sizes.to_dict(),
        "machine": clock.machine(args.gemm_size),
        "stops": stops(sizes, by_rank),
        "block": {**block, "target": TARGET, "within_target": block["recovered"] >= TARGET},
        "formulas": {**FORMULAS, "wire": RING},
    }


def text(numbers: dict[str, Any]) -> str:
    """For people: a table of the shares, the freezing itself, then the block."""
    s, block, machine = numbers["sizes"], numbers["block"], numbers["machine"]
    times = block["seconds"]
    verdict = "at least" if block["within_target"] else "below"
    lines = [
        f"{machine['device']}; {s['ranks']} ranks, ep_size {s['ep']}, ZeRO-{s['stage']}, {s['dtype']}; {s['layers']} "
        f"blocks of {s['experts']} experts of {s['d']:,} x {s['width']:,}; {s['micro_batch']} x {s['context']:,} "
        "tokens per rank",
        stops_text(numbers["stops"]),
        f"one block on {block['tokens']:,} tokens, no communication: forward and backward {brief(times['training'])} s "
        f"with all experts training, {brief(times['frozen'])} s with all frozen: {percent(block['share_saved'])} less "
        f"(1/3 of the FLOPs)\nthe weight-gradient products alone take {brief(times['weight_gradients'])} s; saved is "
        f"{percent(block['recovered'])} of that, {verdict} {percent(block['target'])} (of what plain FFNs save: "
        f"{percent(block['recovered_of_plain'])})",
        "\n".join(f"{name.replace('_', ' ')}: {formula}" for name, formula in numbers["formulas"].items()),
    ]
    return "\n\n".join(lines)


def _read(args: argparse.Namespace, device: str) -> tuple[FreezeSizes, int]:
    """Sizes of the run and tokens of the single block, checked."""
    take_usual(args, {"ranks": torch.cuda.device_count(), **_DEFAULTS[device]})
    for name in (*_SIZES, "ep", "steps", "repeats"):
        require_at_least(args, name, 1)
    if device == "cuda" and args.ranks > torch.cuda.device_count():
        raise MocteError(f"--ranks {args.ranks}: torch sees {torch.cuda.device_count()} CUDA devices, one per rank.")
    names = ("d", "width", "layers", "experts", "ep", "stage", "micro_batch", "context", "dtype", "ranks", "steps")
    sizes = FreezeSizes(**{name: getattr(args, name) for name in names}, frozen=_shares(args.frozen, args.experts))
    # Refuses a number of experts or ranks, and a model, that make no sense.
    MocteConfig.from_dict(sizes.config()["mocte"], sizes.ranks)
    _ = sizes.model
    return sizes, args.block_tokens


def _shares(given: str, experts: int) -> tuple[int, ...]:
    """The list of percents.

    Raises:
        MocteError: no list of numbers between 0 and 100 that ascend from 0, or no whole number of experts.
    """
    try:
        shares = tuple(int(word) for word in given.split(","))
    except ValueError:
        shares = ()
    if (
        not shares
        or shares[0] != 0
        or shares[-1] > 100
        or any(a >= b for a, b in zip(shares, shares[1:], strict=False))
    ):
        raise MocteError(f"--frozen {given} must be whole percents that ascend from 0 to at most 100, as 0,50,100.")
    for share in shares:
        if share * experts % 100:
            raise MocteError(
                f"--frozen {given}: {share} % of --experts {experts} is not a whole number; give 4 experts or "
                "a multiple."
            )
    return shares


def _require_memory(sizes: FreezeSizes, device: torch.device) -> None:
    """Refuse a run that does not fit on this machine, or on CUDA on one device."""
    model = sizes.model
    experts = (sizes.experts - 1) * sizes.layers * 3 * sizes.d * sizes.width // sizes.ep
    parameters = model.num_params() + experts
    # Attention scores exist on a CPU only.
    scores = 6 * model.num_heads * sizes.context if device.type == "cpu" else 0
    layer = 34 * sizes.d + 8 * sizes.width + scores
    width = sizes.torch_dtype.itemsize
    # Weights twice while ZeRO flattens them, gradients and their bucket, optimizer; activations; logits in fp32.
    one = parameters * (4 * width + 12) + sizes.tokens * (sizes.layers * layer * width + 14 * sizes.vocab)
    ranks = sizes.ranks if device.type == "cpu" else 1
    what = f"a run of {sizes.layers} x {sizes.experts} experts of {sizes.d} x {sizes.width} on {sizes.ranks} ranks"
    require_memory(one * ranks, device, what, "Give a smaller --width, --layers or --micro-batch.")
