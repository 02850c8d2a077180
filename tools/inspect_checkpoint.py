#!/usr/bin/env python
"""Shows what is in a checkpoint, how large it is, in which modes its blocks are, and whether every file is whole."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import print_all, run_cli
from mocte_ds.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: tools/inspect_checkpoint.py DIR [--experts] [--features DATA [--sampling] [--conflict]] [--json].

    Exit code 1 where a file is damaged.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit code: 0 whole; 1 a file is missing, damaged or unexpected; 2 no checkpoint. "
        "example: python tools/inspect_checkpoint.py runs/quickstart/checkpoints",
    )
    parser.add_argument("checkpoint", metavar="DIR", type=Path, help="a run's checkpoints folder, or one tag in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--experts", action="store_true", help="also: how far each bank's experts have grown apart")
    parser.add_argument(
        "--features",
        metavar="DATA",
        type=Path,
        help="also: spectrum and clusters, by layer, of what its FFNs read and its attention gives on this prepared "
        "data's validation text",
    )
    parser.add_argument(
        "--sequences", type=int, default=2048, metavar="N", help="sequences of that text (default: %(default)s)"
    )
    parser.add_argument(
        "--sampling",
        action="store_true",
        help="with --features: how far the directions of fewer rows are from those of all, certificates and bounds",
    )
    parser.add_argument(
        "--conflict",
        action="store_true",
        help="with --features: how far the domains' gradients disagree in each dense FFN and in experts",
    )
    args = parser.parse_args(argv)
    if (args.sampling or args.conflict) and args.features is None:
        raise ConfigError("--sampling and --conflict need --features DATA.")

    from mocte_ds.checkpoints.inspection import checkpoint_facts, checkpoint_text

    facts = checkpoint_facts(args.checkpoint)
    problems = [entry["problem"] for entry in facts["files"] if entry["problem"]]
    text = checkpoint_text(facts)
    if args.experts and not problems:
        from mocte_ds.checkpoints.likeness import expert_likeness, likeness_text

        facts["likeness"] = expert_likeness(args.checkpoint)
        text += "\n\n" + likeness_text(facts["likeness"])
    if args.features is not None and not problems:
        from mocte_ds.evaluation.feature_tables import facts_text, feature_facts, sampling_facts, sampling_text
        from mocte_ds.evaluation.features import FFN, Features, read_features

        features = read_features(args.checkpoint, args.features, args.sequences)
        facts["features"] = feature_facts(features)
        text += "\n\n" + facts_text(facts["features"])
        if args.sampling:
            read = {key: rows for key, rows in features.rows.items() if key[1] == FFN}
            facts["sampling"] = sampling_facts(Features(read, features.source, features.domains))
            text += "\n\n" + sampling_text(facts["sampling"])
        if args.conflict:
            from mocte_ds.evaluation.conflicts import conflicts_text, read_conflicts

            facts["conflict"] = read_conflicts(args.checkpoint, args.features, args.sequences)
            text += "\n\n" + conflicts_text(facts["conflict"])
    print_all(json.dumps(facts) if args.json else text)
    if problems:
        print(f"damaged: {'; '.join(problems)}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
