#!/usr/bin/env python
"""Brings a checkpoint to another number of ranks or another ep_size: experts, master weights, moments, everything."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.paths import require_folder_for


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/reshape.py IN OUT --world-size M [--ep-size N] [--json]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/reshape.py runs/NAME/checkpoints runs/NAME-8 --world-size 8 --ep-size 4, then "
        "deepspeed --num_accelerators 8 launch/pretrain.py --run NAME.yaml --resume runs/NAME-8 --out runs/NAME-on-8 "
        "--set deepspeed.mocte.ep_size=4",
    )
    parser.add_argument("checkpoint", metavar="IN", type=Path, help="a run's checkpoints folder, or one tag in it")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of checkpoints to write, for --resume")
    parser.add_argument("--world-size", type=int, required=True, metavar="M", help="data-parallel ranks")
    parser.add_argument(
        "--ep-size", type=int, default=1, metavar="N", help="ranks that share the experts of a block (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    require_folder_for(args.out, "OUT")

    from mocte_ds.checkpoints.reshaping.reshape import reshape

    print(f"checking {args.checkpoint} ...", file=sys.stderr, flush=True)
    facts = reshape(args.checkpoint, args.out, args.world_size, args.ep_size, progress=True)
    if args.json:
        print(json.dumps(facts))
    else:
        print(
            f"done: {facts['path']}, step {facts['step']}, from {facts['before']} to {facts['after']}; "
            f"{facts['files']} files, {facts['bytes'] / 1e6:,.1f} MB"
        )
        if facts["open_check"]:
            print("a check had measured and not decided; it is left out, the next one decides")
    return 0


if __name__ == "__main__":
    run_cli(main)
