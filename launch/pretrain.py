"""Pre-trains a decoder: deepspeed launch/pretrain.py --run FILE [--out DIR] [--set KEY=VALUE].

torchrun reads --run as the beginning of one of its own options; --run-file is the same under every launcher.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mocte_ds.cli import run_cli
from mocte_ds.errors import MocteError
from mocte_ds.ownership.run_lock import RunLock, run_lock
from mocte_ds.paths import require_folder_for
from mocte_ds.shipped import INSTALLED, ROOT
from mocte_ds.stop import end_on_signals
from mocte_ds.training.lost import forget_cause, give_way, word_of_errors
from mocte_ds.user_files import add_import_option, import_files

if TYPE_CHECKING:
    from mocte_ds.training.start import Start

EXTENSIONS = None if INSTALLED else ROOT / ".cache" / "torch_extensions"
"""Of a checkout, where launch/setup.sh builds too; None: the user's."""


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", "--run-file", type=Path, required=True, help="run file (YAML), or the name of one that ships"
    )
    parser.add_argument("--out", type=Path, default=None, help="the run's folder (default: runs/NAME)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--resume", default="auto", help="auto (default), no, or the folder of a run to go on from")
    parser.add_argument("--stop-after", type=int, default=None, metavar="STEP", help="save and end after this step")
    parser.add_argument(
        "--profile",
        default=None,
        metavar="STEPS",
        help="record a step or a range of steps, such as 20-24: traces and the share of each part, in OUT/profile",
    )
    parser.add_argument(
        "--allow-data-change", action="store_true", help="go on with other data, another mix or another seed"
    )
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument("--no-preflight", action="store_true", help="do not look at hosts and links before the start")
    looks.add_argument("--preflight-only", action="store_true", help="look at hosts and links, and end")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's log")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_import_option(parser)
    args = parser.parse_args(argv)
    out = Path("runs") / args.run.stem if args.out is None else args.out
    rank = int(os.environ.get("RANK", "0"))
    try:
        # What is refused here leaves nothing in a folder that may be somebody else's.
        start = _checked(args, out)
    except MocteError as error:
        give_way(rank, error)
        raise
    return _pretrain(args, start, rank)


def _checked(args: argparse.Namespace, out: Path) -> "Start":
    # torch takes seconds to import: a signal must find its handler before.
    from mocte_ds.training.run_config import read_run

    import_files(args.imports)
    run = read_run(args.run, args.set)
    require_folder_for(out, "--out")
    from mocte_ds.training.start import make_start

    if args.profile is not None:
        from mocte_ds.training.profile import read_steps

        steps = run.training.steps
        args.profile = read_steps(args.profile, steps if args.stop_after is None else min(steps, args.stop_after))
    return make_start(run, out, args.resume, int(os.environ.get("WORLD_SIZE", "1")), args.allow_data_change)


def _pretrain(args: argparse.Namespace, start: "Start", rank: int) -> int:
    if start.finished:
        if rank == 0:
            print(f"done already: {start.out} has its {start.step} steps", file=sys.stderr)
        return 0
    with run_lock(start.out) if rank == 0 else contextlib.nullcontext() as lock, word_of_errors(start.out, rank):
        start.require_unchanged()
        start.verify_data()
        return _train(args, start, rank, lock)


def _train(args: argparse.Namespace, start: "Start", rank: int, lock: RunLock | None) -> int:
    # DeepSpeed takes seconds to import; nothing above should wait for that.
    if not args.verbose:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger
    from torch import device as torch_device

    from mocte_ds.dist.begin import begin_group
    from mocte_ds.dist.collectives import wait_for_all
    from mocte_ds.dist.cpu_op import build_cpu_op
    from mocte_ds.dist.end import end_process_groups, end_process_groups_at_exit
    from mocte_ds.dist.mesh import mesh_of_processes
    from mocte_ds.dist.shared_memory import forget_shared_memory
    from mocte_ds.training.loop import Trainer

    if not args.verbose:
        logger.setLevel(logging.ERROR)
    if get_accelerator().device_name() == "cpu":
        build_cpu_op(os.environ.get("TORCH_EXTENSIONS_DIR", EXTENSIONS))
    with contextlib.redirect_stdout(sys.stdout if args.verbose else io.StringIO()):
        begin_group()
    forget_shared_memory()
    end_process_groups_at_exit()  # a run that is refused ends by an error
    if rank == 0:
        forget_cause(start.out)
    world = mesh_of_processes().world
    start.require_agreed(world)
    if not args.no_preflight:
        from mocte_ds.plan.preflight import preflight

        line = preflight(start.run, start.out, world, torch_device(get_accelerator().current_device_name()))
        if rank == 0 and (args.preflight_only or ";" in line):
            print(line, file=sys.stderr)
        if args.preflight_only:
            end_process_groups()
            return 0
    trainer = Trainer(start, lock)
    finished = trainer.train(args.stop_after, args.profile)
    if rank == 0:
        step = trainer.engine.global_steps
        print(f"{'done' if finished else 'stopped'} at step {step}; the run is in {start.out}", file=sys.stderr)
    wait_for_all(trainer.mesh.world)
    end_process_groups()
    return 0


if __name__ == "__main__":
    end_on_signals()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_cli(main)
