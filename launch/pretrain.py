"""Pre-trains a decoder: deepspeed launch/pretrain.py --run launch/runs/NAME.yaml [--out DIR] [--set section.key=value]."""

import argparse
import logging
import os
import sys
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.training.run_config import read_run


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run file (YAML)")
    parser.add_argument("--out", type=Path, default=None, help="the run's folder (default: runs/NAME)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--resume", default="auto", help="auto (default), no, or the folder of a run to go on from")
    parser.add_argument("--stop-after", type=int, default=None, metavar="STEP", help="save and end after this step")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's log")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    run = read_run(args.run, args.set)
    out = args.out or Path("runs") / args.run.stem

    # DeepSpeed takes seconds to import; a wrong run file should not wait for that.
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    from mocte_ds.training.loop import Trainer

    if not args.verbose:
        logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(get_accelerator().communication_backend_name())
    trainer = Trainer(run, out, args.resume)
    finished = trainer.train(args.stop_after)
    if trainer.rank == 0:
        step = trainer.engine.global_steps
        print(f"{'done' if finished else 'stopped'} at step {step}; the run is in {out}", file=sys.stderr)
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_cli(main)
