#!/usr/bin/env python
"""Make a web page with figures and tables from the logs of a run, also while it is still going."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.paths import require_folder_for


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: tools/report.py RUN_DIR [--out DIR] [--json]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/report.py runs/quickstart   then open runs/quickstart/report/index.html",
    )
    parser.add_argument("run_dir", type=Path, help="the run folder (with metrics.jsonl in it)")
    parser.add_argument("--out", type=Path, help="folder for index.html and the PNG files (default: RUN_DIR/report)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    args = parser.parse_args(argv)
    if args.out is not None:
        require_folder_for(args.out, "--out")

    from mocte_ds.report import write_report

    result = write_report(args.run_dir, args.out)
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
