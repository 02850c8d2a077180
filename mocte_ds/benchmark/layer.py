"""One mixture layer, forward and backward, beside the same FFNs without routing and beside other mixtures."""

import argparse
from typing import Any

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.layer_arms import LOADS, LayerSizes
from mocte_ds.benchmark.measure.layer_run import run_rank
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.options import add_sizes, require_at_least, take_usual
from mocte_ds.cli import seconds
from mocte_ds.dist.processes import run_ranks
from mocte_ds.errors import MocteError
from mocte_ds.text_table import brief, text_table

WORDS = {
    "dense": "dense FFN, all tokens",
    "slices": "the experts on equal slices, no routing",
    "given_loads": "the experts on as many rows as the loads say, no routing",
    "grouped": "sort, one grouped product per matrix",
    "block": "MO-CTE, weight 'hard'",
    "block_learned": "MO-CTE, weight 'softmax', learns",
    "deepspeed": "DeepSpeed MoE, capacity 1.25",
    "deepspeed_no_drop": "DeepSpeed MoE, drops nothing",
    "autoep": "DeepSpeed's AutoEP layer, top-1",
    "mixtral": "transformers' Mixtral block, top-1",
}
_DEFAULTS = {
    "cpu": {"d": 512, "width": 1408, "tokens": 4096},
    "cuda": {"d": 4096, "width": 14336, "tokens": 16384},
}
_SIZES = {"d": "features", "width": "hidden units of an expert", "tokens": "tokens per rank"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the layer; those without a number here depend on the device."""
    add_sizes(parser, _SIZES, _DEFAULTS)
    parser.add_argument("--experts", type=int, default=8, help="experts of all ranks together (default: %(default)s)")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="data type (default: %(default)s)")
    parser.add_argument(
        "--loads", choices=LOADS, default="even", help="tokens of the experts; one-empty: one has none (default: even)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="turns of all arms (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=seconds, default=600.0, help="seconds for the processes (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line.

    Raises:
        MocteError: sizes that make no sense or do not fit into memory.
    """
    clock = Clock(args.device)
    kind = clock.device.type
    take_usual(args, _DEFAULTS[kind])
    for name, least in {**dict.fromkeys(_SIZES, 1), "experts": 2, "ep": 1, "repeats": 1}.items():
        require_at_least(args, name, least)
    if args.experts % args.ep or args.experts > args.d:
        raise MocteError(f"--experts {args.experts} must be a multiple of --ep {args.ep}, and at most --d {args.d}.")
    sizes = LayerSizes(args.d, args.width, args.experts, args.tokens, args.ep, args.dtype, args.loads)
    # Mixtral's block has all experts on every rank, with --ep > 1 until AutoEP has taken this rank's.
    experts = (len(WORDS) - 1) * args.experts // args.ep + args.experts
    arms = 2 * experts * 3 * args.d * args.width
    needed = args.ep * sizes.torch_dtype.itemsize * (arms + args.tokens * (16 * args.d + 16 * args.width))
    memory = require_memory(
        needed, clock.device, f"{len(WORDS)} layers of these sizes", "Give a smaller --width, --d or --tokens."
    )
    found = run_ranks(run_rank, args.ep, sizes, kind, args.repeats, timeout=args.time_limit, device=kind)[0]
    return {"benchmark": "layer", "sizes": sizes.to_dict(), "memory": memory, "words": WORDS, **found}


def text(numbers: dict[str, Any]) -> str:
    """For people: a row per arm."""
    s = numbers["sizes"]
    head = ["layer", "ms", "x slices", "x dense"]
    rows = [
        [WORDS[name], brief(1000 * arm["seconds"]), brief(arm["over_slices"]), brief(arm["over_dense"])]
        for name, arm in numbers["arms"].items()
    ]
    return (
        f"d {s['d']:,}, width {s['width']:,}, {s['experts']} experts over {s['ep']} ranks, {s['tokens']:,} tokens per "
        f"rank, {s['dtype']}, loads {s['loads']} ({brief(numbers['rows'])}), {numbers['device']}, {numbers['threads']} "
        "threads per rank; forward and backward, medians; x: median of the ratios of each turn\n\n"
        + text_table(head, rows, left=("layer",))
    )
