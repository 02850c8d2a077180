#!/usr/bin/env python
"""Times the parts of MO-CTE on this machine, with bytes, FLOPs and the share of training time that they take."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from mocte_ds.benchmark import benchmarks, load
from mocte_ds.cli import run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/benchmark.py NAME [options]; see --help and NAME --help."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/benchmark.py spectrum --d 4096 --layers 32 --rows 8192 --json",
    )
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    # Whatever an import prints must not stand in front of the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        for name, first_line in benchmarks().items():
            command = commands.add_parser(name, help=first_line, description=first_line)
            if name == next((word for word in argv if not word.startswith("-")), None):
                load(name).add_arguments(command)
            command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
            command.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        numbers = load(args.name).run(args)
    print(json.dumps(numbers) if args.json else load(args.name).text(numbers))
    return 0


if __name__ == "__main__":
    run_cli(main)
