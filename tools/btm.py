"""Branch-train-merge: clusters of documents, and their dense models mixed at test time or merged into one mixture."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocte_ds.cli import count, count_or_zero, run_cli
from mocte_ds.paths import require_folder_for
from mocte_ds.text_table import text_table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/btm.py cluster|mix|merge, see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="docs/pretraining.md has the whole way, from data to losses."
    )
    steps = parser.add_subparsers(dest="step", required=True)
    cluster = steps.add_parser("cluster", help="cut the training documents of prepared data into clusters")
    cluster.add_argument("prepared", type=Path, help="folder of tools/prepare_data.py")
    cluster.add_argument("out", metavar="OUT", type=Path, help="prepared data to write, a domain for each cluster")
    cluster.add_argument("--clusters", type=count, default=8, metavar="N", help="how many (default: %(default)s)")
    cluster.add_argument("--rank", type=count, default=100, help="directions of the SVD (default: %(default)s)")
    cluster.add_argument(
        "--seed", type=count_or_zero, default=0, help="of the SVD and of k-means (default: %(default)s)"
    )
    mix = steps.add_parser("mix", help="losses of the models' mixtures on the validation sequences of a run")
    mix.add_argument("clustered", type=Path, help="folder that `cluster` wrote")
    mix.add_argument("checkpoints", type=Path, nargs="+", help="one of each cluster, in their order")
    mix.add_argument("--sequences", type=count, default=16, metavar="N", help="of each domain (default: %(default)s)")
    mix.add_argument("--temperature", type=float, nargs="+", default=[0.1], metavar="T", help="default: 0.1")
    mix.add_argument(
        "--top-k", type=count, nargs="+", metavar="K", help="experts of a token (default: 1, 2, 4, ... all)"
    )
    merge = steps.add_parser("merge", help="a start for model.init, whose experts are the models' FFNs")
    merge.add_argument("checkpoints", type=Path, nargs="+", help="dense models of one config")
    merge.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder to write")
    merge.add_argument("--top-k", type=count, default=2, metavar="K", help="experts of a token (default: %(default)s)")
    merge.add_argument("--modules", default="auto", help="glob of the FFNs that become experts (default: all)")
    merge.add_argument("--seed", type=count_or_zero, default=0, help="of the routers (default: %(default)s)")
    for step in (cluster, mix, merge):
        step.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.step != "mix":
        require_folder_for(args.out, "OUT")
    facts, text = {"cluster": _cluster, "mix": _mix, "merge": _merge}[args.step](args)
    print(json.dumps(facts) if args.json else text)
    return 0


def _cluster(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from mocte_ds.btm.partition import partition

    facts = partition(args.prepared, args.out, args.clusters, args.rank, args.seed)
    domains = list(next(iter(facts.values()))["from"])
    rows = [
        [name, f"{found['documents']:,}", f"{found['tokens']:,}", *(str(found["from"][domain]) for domain in domains)]
        for name, found in facts.items()
    ]
    table = text_table(["cluster", "documents", "tokens", *domains], rows, ("cluster",))
    return {
        "path": str(args.out),
        "clusters": facts,
    }, f"{table}\nnext: runs with --set data.prepared={args.out} --set " + ("'data.weights={cluster0: 1}', and so on")


def _mix(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from mocte_ds.btm.mixture import mixture_losses

    models = len(args.checkpoints)
    top_ks = args.top_k or [*(1 << n for n in range((models - 1).bit_length())), models]
    alone, mixtures, parameters = mixture_losses(
        args.clustered, args.checkpoints, args.sequences, args.temperature, top_ks
    )
    rows = [[f"expert {number}", *_cells(losses)] for number, losses in enumerate(alone)]
    rows += [[f"top {one.top_k}, temperature {one.temperature:g}", *_cells(one.losses)] for one in mixtures]
    table = text_table(["loss", "mean", *(name for name in alone[0] if name != "mean")], rows, ("loss",))
    facts = {"parameters": parameters, "experts": alone, "mixtures": [one.to_dict() for one in mixtures]}
    return facts, f"{table}\n{parameters:,} parameters in {models} models"


def _cells(losses: dict[str, float]) -> list[str]:
    return [f"{losses['mean']:.4f}", *(f"{value:.4f}" for name, value in losses.items() if name != "mean")]


def _merge(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from mocte_ds.btm.merge import merge

    facts = merge(args.checkpoints, args.out, args.top_k, args.seed, args.modules)
    return facts, (
        f"done: {args.out} has {facts['experts']} experts in each of {facts['blocks']} blocks, {facts['parameters']:,} "
        f"parameters\nnext: a run with model.init: {args.out} and deepspeed.mocte: {json.dumps(facts['mocte'])}"
    )


if __name__ == "__main__":
    run_cli(main)
