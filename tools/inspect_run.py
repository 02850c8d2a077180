#!/usr/bin/env python
"""Shows the checks of a run and what changed after them, also while it still goes; or several runs, by block."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import print_all, run_cli
from mocte_ds.errors import MocteError


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/inspect_run.py RUN_DIR [RUN_DIR ...] [--check STEP|last|all] [--block B] [--json]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/inspect_run.py runs/quickstart --check last",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        help="the run folder (with metrics.jsonl in it); of several: emergence, clusters and conflict by block",
    )
    parser.add_argument(
        "--check", metavar="STEP|last|all", help="show these checks in full (default: one line per check)"
    )
    parser.add_argument("--block", type=int, help="show this block only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    from mocte_ds.report.check_detail import check_text, chosen_checks
    from mocte_ds.report.reader import read_run
    from mocte_ds.report.run_table import headline, run_facts, run_text
    from mocte_ds.report.several_runs import several_facts, several_text

    runs = [read_run(folder) for folder in args.run_dir]
    for run in runs:
        if args.block is not None and args.block not in run.blocks:
            known = ", ".join(map(str, run.blocks)) or "none"
            raise MocteError(f"there is no block {args.block} in {run.folder}; blocks: {known}.")
    if len(runs) > 1:
        if args.check:
            raise MocteError("--check shows checks of one run; leave it out, or name one run.")
        several = [fact for fact in several_facts(runs) if args.block in (None, fact["block"])]
        print_all(json.dumps({"blocks": several}) if args.json else several_text(several))
        return 0
    run = runs[0]
    checks = chosen_checks(run, args.check) if args.check else None
    if args.json:
        facts = run_facts(run)
        if checks is not None:
            steps = {check["step"] for check in checks}
            for name in ("checks", "events"):
                facts[name] = [event for event in facts[name] if event["step"] in steps]
        if args.block is not None:
            facts["events"] = [event for event in facts["events"] if event.get("block") in (args.block, None)]
            for check in facts["checks"]:
                check["blocks"] = [entry for entry in check["blocks"] if entry["block"] == args.block]
        output = json.dumps(facts)
    elif checks is None:
        output = run_text(run, args.block)
    else:
        output = "\n\n\n".join([headline(run), *(check_text(run, check, args.block) for check in checks)])
    print_all(output)
    return 0


if __name__ == "__main__":
    run_cli(main)
