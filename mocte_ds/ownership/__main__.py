"""Removal for shell scripts: python -m mocte_ds.ownership FOLDER; nothing but what the tools wrote."""

import argparse
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.ownership.remove import remove, remove_listed
from mocte_ds.ownership.run_lock import require_idle


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(prog="python -m mocte_ds.ownership", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that tools filled")
    parser.add_argument(
        "--keep-others", action="store_true", help="remove what is ours and leave the rest, in place of refusing"
    )
    args = parser.parse_args(argv)
    require_idle(args.folder)
    if args.keep_others:
        remove_listed(args.folder)
    else:
        remove(args.folder)


if __name__ == "__main__":
    run_cli(main)
