#!/usr/bin/env python
"""Converts a checkpoint to megatron-core's distributed format, or back; checked before it reports success."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError
from mocte_ds.paths import require_folder_for
from mocte_ds.user_files import add_import_option, import_files


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/to_megatron.py runs/NAME/checkpoints runs/NAME/megatron",
    )
    parser.add_argument(
        "source", type=Path, help="a run's checkpoints folder, or one tag in it; with --back the folder"
    )
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--back", action="store_true", help="from megatron-core to a checkpoint of weights alone")
    parser.add_argument(
        "--settings",
        type=Path,
        default=None,
        metavar="DIR",
        help="with --back, for what a training with megatron-core wrote: the folder of this tool that it began with",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="weights (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_import_option(parser)
    args = parser.parse_args(argv)
    import_files(args.imports)
    require_folder_for(args.out, "OUT")
    if args.settings and not args.back:
        raise ConfigError("--settings belongs to the way back; give --back too, or leave it out.")
    # Whatever an import prints must not stand in front of the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        from mocte_ds.convert.megatron.convert import from_megatron, to_megatron

        def tell(text: str) -> None:
            print(f"{text} ...", file=sys.stderr, flush=True)

        if args.back:
            facts = from_megatron(args.source, args.out, args.dtype, tell, args.settings)
        else:
            facts = to_megatron(args.source, args.out, args.dtype, tell)
    if args.json:
        print(json.dumps({"path": str(args.out), **facts}))
    elif args.back:
        print(f"done: {args.out} is a checkpoint of weights alone; {facts['tensors_compared']} tensors equal")
    else:
        print(
            f"done: {args.out} is a GPTModel with {facts['parameters']:,} parameters; {facts['tensors_compared']} "
            f"tensors and {facts['experts_compared']} experts equal, logits within {facts['logit_difference']:.1e}"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
