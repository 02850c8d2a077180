#!/usr/bin/env python
"""Writes the fp32 weights of a checkpoint, the experts of all ranks among them, as one pytorch_model.bin."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.ownership import note_built, require_apart
from mocte_ds.paths import require_folder_for
from mocte_ds.user_files import add_import_option, import_files


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/zero_to_fp32.py CHECKPOINT OUT [--tag TAG] [--exclude-frozen-parameters] [--json]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="for a model that runs by itself use export_hf. example: python tools/zero_to_fp32.py "
        "runs/NAME/checkpoints runs/NAME/fp32",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's checkpoints folder, or one tag")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that gets pytorch_model.bin")
    parser.add_argument("-t", "--tag", default=None, help="name of the checkpoint (default: what `latest` names)")
    parser.add_argument("--exclude-frozen-parameters", action="store_true", help="leave out what does not train")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_import_option(parser)
    args = parser.parse_args(argv)
    import_files(args.imports)

    require_folder_for(args.out, "OUT")
    require_apart(args.out, args.checkpoint)
    from mocte_ds.checkpoints.fp32 import convert_zero_checkpoint_to_fp32_state_dict

    print(f"checking {args.checkpoint} ...", file=sys.stderr, flush=True)
    path = convert_zero_checkpoint_to_fp32_state_dict(
        args.checkpoint, args.out, args.tag, args.exclude_frozen_parameters
    )
    note_built(args.out, [path.name], "zero_to_fp32")
    facts = {"path": str(path), "bytes": path.stat().st_size}
    print(json.dumps(facts) if args.json else f"done: {path}, {facts['bytes'] / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    run_cli(main)
