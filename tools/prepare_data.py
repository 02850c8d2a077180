"""Tokenises a corpus into megatron-core's indexed data, one data set per domain and split, with a manifest."""

import argparse
import json
import os
import time
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.data.corpus import embedded_corpus
from mocte_ds.data.indexed import merge, prepare, prepare_shard
from mocte_ds.data.manifest import Manifest
from mocte_ds.data.shard import Made, Share
from mocte_ds.paths import require_folder_for

_VALIDATION_SHARE = 0.05


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "corpus",
        nargs="?",
        type=Path,
        help="folder with one file or subfolder per domain (docs/data.md; default: the corpus of the package)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; used again where nothing changed")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="sentencepiece model, or a Hugging Face folder with a tokenizer.json",
    )
    parser.add_argument(
        "--validation-share", type=float, help=f"share of documents for validation (default: {_VALIDATION_SHARE})"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes at most (default: %(default)s)"
    )
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument("--shard", type=_share, metavar="I/N", help="tokenise part I of N, into a folder of its own")
    hosts.add_argument(
        "--merge", type=Path, nargs="+", metavar="SHARD", help="put the folders of all N parts together into --out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.merge and args.corpus:
        parser.error("--merge reads the shards alone; name no corpus")
    if args.shard and args.validation_share is not None:
        parser.error("--validation-share is chosen when the shards are merged; leave it out with --shard")
    require_folder_for(args.out, "--out")
    started = time.perf_counter()
    corpus = args.corpus or embedded_corpus()
    if args.shard:
        return _shard(prepare_shard(corpus, args.out, args.tokenizer, args.shard, args.workers), args)
    held_out = _VALIDATION_SHARE if args.validation_share is None else args.validation_share
    manifest, made = (
        merge(args.merge, args.out, args.tokenizer, held_out)
        if args.merge
        else prepare(corpus, args.out, args.tokenizer, held_out, args.workers)
    )
    seconds = round(time.perf_counter() - started, 2)
    if args.json:
        facts = {"path": str(args.out), "made": made, "sha256": manifest.sha256, "domains": manifest.domains}
        print(json.dumps({**facts, "near_duplicates": manifest.near_duplicates, "seconds": seconds}))
        return 0
    print(f"{'prepared' if made else 'found'} {args.out} ({seconds} s)")
    print(_table(manifest))
    return 0


def _share(text: str) -> Share:
    try:
        return Share.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _shard(made: Made, args: argparse.Namespace) -> int:
    """Says what was made of a shard."""
    if args.json:
        facts = {"path": str(args.out), "shard": args.shard.number, "of": args.shard.of}
        print(json.dumps({**facts, "pieces_found": made.found, "pieces_made": made.made}))
        return 0
    print(f"{made.record.title} is complete in {args.out}: {made.found} pieces were there, {made.made} were made")
    print("next: python tools/prepare_data.py --merge SHARD ... --out DIR --tokenizer FILE, when all are complete")
    return 0


def _table(manifest: Manifest) -> str:
    """What there is, and what was found of near-duplicates, for a reader."""
    lines = [
        f"{'domain':<16}{'train documents':>17}{'tokens':>12}{'validation documents':>22}{'tokens':>10}"
        f"{'near-duplicates':>17}"
    ]
    notes = []
    for domain, facts in manifest.domains.items():
        train, held, shared = facts["train"], facts["validation"], facts["near_duplicates"]
        lines.append(
            f"{_printable(domain):<16}{train['documents']:>17,}{train['tokens']:>12,}{held['documents']:>22,}"
            f"{held['tokens']:>10,}{shared['documents']:>17,}"
        )
        if shared["common"] is not None:
            notes.append(
                f"{_printable(domain)}: its documents share so much that text in more than {shared['common']} of them "
                "does not count; that text stands on both sides."
            )
    search = manifest.near_duplicates
    notes.insert(
        0,
        f"near-duplicates: documents that share {search['words']} words in a row with another one; they are all "
        "trained on or all held out.",
    )
    if search["kept_share"] < 1:
        notes.append(
            f"{search['kept_share']:.3g} of these runs were looked at; two documents that share n of them are missed "
            f"with a probability of {1 - search['kept_share']:.4g}^n."
        )
    return "\n".join([*lines, *notes])


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


if __name__ == "__main__":
    run_cli(main)
