"""Pre-trains on the processes of this machine: starts launch/pretrain.py on its GPUs, or on a CPU."""

import argparse
import os
import runpy
import sys

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError
from mocte_ds.hosts import local
from mocte_ds.shipped import LAUNCH, shipped_file, shipped_names

_SCRIPT = LAUNCH / "pretrain.py"
_MOST = 1 << 10


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. Where a launcher has started this process, it becomes one of the ranks."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other options are those of launch/pretrain.py: --out DIR, --set SECTION.KEY=VALUE, --resume, "
        "--stop-after STEP, --allow-data-change, --no-preflight, --preflight-only, --verbose. "
        "example: mocte-ds pretrain --run gpt-140m --set training.steps=100",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run",
        "--run-file",
        required=True,
        help=f"run file (YAML), or the name of one that ships: {', '.join(shipped_names('runs'))}",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="ranks (default: one for each GPU, or two on a CPU)")
    args, options = parser.parse_known_args(words)
    if "RANK" in os.environ:
        if args.processes is not None:
            raise ConfigError("--processes: a launcher has started this process already and says how many there are.")
        sys.argv = [str(_SCRIPT), *words]
        runpy.run_path(str(_SCRIPT), run_name="__main__")
    if args.processes is not None and not 1 <= args.processes <= _MOST:
        raise ConfigError(f"--processes {args.processes} must lie between 1 and {_MOST}.")
    processes = args.processes or local.usual_count()
    run = str(shipped_file("runs", args.run))
    return local.run(local.command(_SCRIPT, ["--run", run, *options], processes), local.environment(processes))


if __name__ == "__main__":
    run_cli(main)
