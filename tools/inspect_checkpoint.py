#!/usr/bin/env python
"""Shows what is in a checkpoint, how large it is, in which modes its blocks are, and whether every file is whole."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import print_all, run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/inspect_checkpoint.py DIR [--experts] [--json]; exit code 1 where a file is damaged."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit code: 0 whole; 1 a file is missing, damaged or unexpected; 2 no checkpoint. "
        "example: python tools/inspect_checkpoint.py runs/quickstart/checkpoints",
    )
    parser.add_argument("checkpoint", metavar="DIR", type=Path, help="a run's checkpoints folder, or one tag in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--experts", action="store_true", help="also: how far each bank's experts have grown apart")
    args = parser.parse_args(argv)

    from mocte_ds.checkpoints.inspection import checkpoint_facts, checkpoint_text

    facts = checkpoint_facts(args.checkpoint)
    problems = [entry["problem"] for entry in facts["files"] if entry["problem"]]
    text = checkpoint_text(facts)
    if args.experts and not problems:
        from mocte_ds.checkpoints.likeness import expert_likeness, likeness_text

        facts["likeness"] = expert_likeness(args.checkpoint)
        text += "\n\n" + likeness_text(facts["likeness"])
    print_all(json.dumps(facts) if args.json else text)
    if problems:
        print(f"damaged: {'; '.join(problems)}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
