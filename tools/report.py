#!/usr/bin/env python
"""Make a web page with figures and tables from the logs of a run, also while it is still going, or compare several."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.paths import require_folder_for


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: tools/report.py RUN_DIR [RUN_DIR ...] [--out DIR] [--json]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/report.py runs/quickstart   then open runs/quickstart/report/index.html",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        help="the run folder (with metrics.jsonl in it); one page compares several",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for index.html and the PNG files (default: RUN_DIR/report; of several runs: comparison, beside "
        "the first one)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    args = parser.parse_args(argv)
    if args.out is not None:
        require_folder_for(args.out, "--out")

    if len(args.run_dir) > 1:
        from mocte_ds.report.comparison import write_comparison

        compared = write_comparison(args.run_dir, args.out)
        print(json.dumps(compared) if args.json else f"comparison: {compared['page']}")
        return

    from mocte_ds.report import write_report

    result = write_report(args.run_dir[0], args.out)
    if args.json:
        print(json.dumps(result))
        return
    for sentence in result["summary"]:
        print(sentence)
    for name, reason in result["missing"].items():
        print(f"no figure '{name}': {reason}")
    print(f"report: {result['page']}")


if __name__ == "__main__":
    run_cli(main)
