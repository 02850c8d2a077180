#!/usr/bin/env python
"""Compares settings: runs every arm of a sweep file with every seed and writes a table of what came out."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError
from mocte_ds.paths import require_folder_for

if TYPE_CHECKING:
    from mocte_ds.sweep import Sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/sweep.py FILE [--out DIR] [--only ARM] [--seeds SEED ...] [--set KEY=VALUE] [--list]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/sweep.py launch/sweeps/routers.yaml --only hash --seeds 0",
    )
    parser.add_argument("file", type=Path, help="sweep file (YAML), e.g. launch/sweeps/routers.yaml")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/sweeps/NAME); what is done is kept")
    parser.add_argument(
        "--only", action="append", metavar="ARM", help="run this arm and the baseline only (may be given several times)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds in place of the file's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change the run file for all arms (what an arm sets itself cannot be changed)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="ranks of a run in place of the file's")
    parser.add_argument("--list", action="store_true", help="check and show the runs and their options, run nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    from mocte_ds.sweep import MOST_RANKS, markdown_table, read_sweep, require_checkout, run_sweep, trials_table

    require_checkout()
    sweep = read_sweep(args.file).with_shared(args.set)
    if args.processes is not None:
        if not 1 <= args.processes <= MOST_RANKS:
            raise ConfigError(f"--processes {args.processes} must lie between 1 and {MOST_RANKS}.")
        sweep = replace(sweep, processes=args.processes)
    chosen = replace(sweep, seeds=list(dict.fromkeys(args.seeds or sweep.seeds)))
    if args.only:
        names = list(dict.fromkeys(name for arm in sweep.arms for name in (arm.of, arm.name)))
        unknown = [name for name in args.only if name not in names]
        if unknown:
            raise ConfigError(f"--only {unknown[0]}: {args.file} has no such arm; arms: {', '.join(names)}.")
        # A result says something beside the baseline's of the same seed only.
        of_baseline = {arm.name for arm in sweep.arms if arm.of == sweep.baseline} | {sweep.baseline}
        wanted = {*args.only, *(() if of_baseline & {*args.only} else (sweep.baseline,))}
        chosen = replace(chosen, arms=[arm for arm in sweep.arms if wanted & {arm.of, arm.name}])
    if args.list:
        _list(chosen, args.json)
        return 0
    out = Path("runs/sweeps") / args.file.stem if args.out is None else args.out
    require_folder_for(out, "--out")
    report = (lambda _line: None) if args.json else (lambda line: print(line, flush=True))
    results = run_sweep(sweep, out, chosen.runs(), report)
    if args.json:
        print(json.dumps({"runs": [result.to_dict() for result in results]}))
    else:
        tables = [markdown_table(sweep, results), trials_table(sweep, results) if sweep.baseline is not None else ""]
        shown = "\n\n".join(table for table in tables if table)
        print(f"\n{shown}\n\n{out / 'results.md'} says what the columns mean.")
    return 0


def _list(sweep: "Sweep", as_json: bool) -> None:
    for arm, seed in sweep.runs():
        sweep.config(arm, seed)  # refuses what launch/pretrain.py would refuse
    if as_json:
        runs = [{"arm": arm.name, "seed": seed, "set": sweep.changes(arm, seed)} for arm, seed in sweep.runs()]
        print(json.dumps({"runs": runs}))
        return
    for arm, seed in sweep.runs():
        options = [word for change in sweep.changes(arm, seed) for word in ("--set", change)]
        print(f"{arm.name} seed {seed}: {shlex.join(options)}")


if __name__ == "__main__":
    run_cli(main)
