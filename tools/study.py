#!/usr/bin/env python
"""Compares settings: tunes the learning rate of every arm of a study file, runs all seeds, and shows what came out."""

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
from mocte_ds.shipped import shipped_file

if TYPE_CHECKING:
    from mocte_ds.study import Study


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/study.py FILE [--out DIR] [--only ARM] [--seeds SEED ...] [--set KEY=VALUE] [--list]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/study.py launch/studies/baselines.yaml --only hash --seeds 0",
    )
    parser.add_argument("file", type=Path, help="study file (YAML), or the name of one that ships, e.g. baselines")
    parser.add_argument(
        "--out", type=Path, help="folder of the runs (default: runs/studies/NAME); what is done is kept"
    )
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
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("--list", action="store_true", help="check and show the runs and their options, run nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    from mocte_ds.study import MOST_RANKS, StudyRunner, all_tables, read_study

    study = read_study(shipped_file("studies", args.file)).with_shared(args.set)
    for name, value in (("--processes", args.processes), ("--at-once", args.at_once)):
        if value is not None and not 1 <= value <= MOST_RANKS:
            raise ConfigError(f"{name} {value} must lie between 1 and {MOST_RANKS}.")
    if args.processes is not None:
        study = replace(study, processes=args.processes)
    chosen = replace(study, seeds=list(dict.fromkeys(args.seeds or study.seeds)))
    if args.only:
        names = [arm.name for arm in study.arms]
        unknown = [name for name in args.only if name not in names]
        if unknown:
            raise ConfigError(f"--only {unknown[0]}: {args.file} has no such arm; arms: {', '.join(names)}.")
        # A result says something beside the baseline's of the same seed only.
        wanted = {*args.only, study.baseline}
        chosen = replace(chosen, arms=[arm for arm in study.arms if arm.name in wanted])
    if args.list:
        _list(chosen, args.json)
        return 0
    out = Path("runs/studies") / args.file.stem if args.out is None else args.out
    require_folder_for(out, "--out")
    report = (lambda _line: None) if args.json else (lambda line: print(line, flush=True))
    results = StudyRunner(study, out, report, args.at_once, chosen).run()
    if args.json:
        print(json.dumps({"runs": [result.to_dict() for result in results]}))
    else:
        print(
            "\n" + all_tables(study, results)[0].markdown() + f"\n\n{out / 'index.html'} shows all tables and figures."
        )
    return 0


def _list(study: "Study", as_json: bool) -> None:
    """Show the runs; those after trials with the learning rate left open."""
    runs = [*study.trials(), *study.runs({arm.name: None for arm in study.arms})]
    for run in runs:
        study.config(run)  # refuses what launch/pretrain.py would refuse
    if as_json:
        print(
            json.dumps(
                {"runs": [{"name": r.name, "arm": r.arm.name, "seed": r.seed, "set": study.changes(r)} for r in runs]}
            )
        )
        return
    for run in runs:
        options = [word for change in study.changes(run) for word in ("--set", change)]
        rate = "  # and the best learning rate of its trials" if study.rates and not run.trial else ""
        print(f"{run.name}: {shlex.join(options)}{rate}")


if __name__ == "__main__":
    run_cli(main)
