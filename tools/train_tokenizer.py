"""Trains a sentencepiece tokenizer on a corpus."""

import argparse
import json
import time
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.data.corpus import embedded_corpus
from mocte_ds.data.tokenizer import Tokenizer, train_tokenizer
from mocte_ds.paths import require_file_for


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "corpus",
        nargs="?",
        type=Path,
        help="folder with one file or subfolder per domain (docs/data.md; default: the corpus of the package)",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, e.g. data/tokenizer.model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        help="number of pieces, 256 bytes and 4 special ones included (default: %(default)s)",
    )
    parser.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="model type (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="choice of text in a large corpus")
    parser.add_argument("--if-missing", action="store_true", help="do nothing where a tokenizer of that size is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    require_file_for(args.out, "--out")
    started = time.perf_counter()
    made = True
    if args.if_missing and args.out.is_file() and Tokenizer(args.out).vocab_size == args.vocab_size:
        made = False
    else:
        train_tokenizer(args.corpus or embedded_corpus(), args.out, args.vocab_size, args.type, args.seed)
    tokenizer = Tokenizer(args.out)
    facts = {
        "path": str(args.out),
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "made": made,
        "seconds": round(time.perf_counter() - started, 2),
    }
    verb = "trained" if made else "found"
    print(json.dumps(facts) if args.json else f"{verb} {args.out}: {tokenizer.vocab_size} pieces, {facts['seconds']} s")
    return 0


if __name__ == "__main__":
    run_cli(main)
