"""Tokenises a corpus into megatron-core's indexed data, one data set a domain and split, with a manifest."""

import argparse
import json
import os
import time
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.data.corpus import embedded_corpus
from mocte_ds.data.indexed import prepare
from mocte_ds.paths import require_folder_for


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "corpus",
        nargs="?",
        type=Path,
        help="folder with DOMAIN.jsonl[.gz], .parquet or .txt files (default: the corpus of the package)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; used again where nothing changed")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="sentencepiece model, or a Hugging Face folder with a tokenizer.json",
    )
    parser.add_argument(
        "--validation-share", type=float, default=0.05, help="share of documents for validation (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes at most (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    require_folder_for(args.out, "--out")
    started = time.perf_counter()
    manifest, made = prepare(
        args.corpus or embedded_corpus(), args.out, args.tokenizer, args.validation_share, args.workers
    )
    seconds = round(time.perf_counter() - started, 2)
    if args.json:
        facts = {"path": str(args.out), "made": made, "sha256": manifest.sha256, "domains": manifest.domains}
        print(json.dumps({**facts, "seconds": seconds}))
        return 0
    print(f"{'prepared' if made else 'found'} {args.out} ({seconds} s)")
    print(f"{'domain':<16}{'train documents':>17}{'tokens':>12}{'validation documents':>22}{'tokens':>10}")
    for domain, facts in manifest.domains.items():
        train, held = facts["train"], facts["validation"]
        print(
            f"{domain:<16}{train['documents']:>17,}{train['tokens']:>12,}{held['documents']:>22,}{held['tokens']:>10,}"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
