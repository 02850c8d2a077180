#!/usr/bin/env python
"""Plans a run before it is started: memory by phase, layouts that fit, bytes on the wire, days; nothing is built."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import print_all, run_cli
from mocte_ds.errors import ConfigError
from mocte_ds.user_files import add_import_option, import_files


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/plan.py --run launch/runs/llama-7b.yaml --gpus 64 --gpu-memory 80",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FILE", help="run file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run file")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: the hardware's)")
    parser.add_argument("--hardware", default="h100", metavar="NAME", help="rates of a GPU (default: %(default)s)")
    parser.add_argument("--hardware-file", type=Path, metavar="FILE", help="YAML with rates (default: the shipped one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_import_option(parser)
    args = parser.parse_args(argv)
    import_files(args.imports)
    for name in ("gpus", "gpus_per_host"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more.")
    if args.gpu_memory is not None and not 0 < args.gpu_memory < 1e6:
        raise ConfigError("--gpu-memory is in GB, and must be more than 0.")

    from mocte_ds.plan.layouts import Machine, plan
    from mocte_ds.plan.speed import read_hardware
    from mocte_ds.plan.table import plan_text
    from mocte_ds.training.run_config import read_run

    hardware = read_hardware(args.hardware, args.hardware_file)
    size = hardware.memory if args.gpu_memory is None else args.gpu_memory * 1e9
    found = plan(read_run(args.run, args.set), Machine(args.gpus, args.gpus_per_host, size, hardware))
    print_all(json.dumps(found) if args.json else plan_text(found))
    return 0


if __name__ == "__main__":
    run_cli(main)
