"""Imports a model in Hugging Face format as the start of a run; checked before it reports success."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError
from mocte_ds.json_files import read_json
from mocte_ds.paths import require_folder_for


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="model in Hugging Face format, with its tokenizer")
    parser.add_argument("out", type=Path, help="folder to write, for model.init of a run file")
    parser.add_argument(
        "--max-positions", type=int, default=None, help="longest context of the run (default: the folder's)"
    )
    parser.add_argument(
        "--emerge", type=Path, default=None, metavar="CORPUS", help="texts; experts emerge at once from their features"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        help='DeepSpeed config (JSON) whose "mocte" block says which experts emerge (default: the default settings, '
        "in every layer)",
    )
    parser.add_argument(
        "--context", type=int, default=256, help="tokens per sequence of the corpus (default: %(default)s)"
    )
    parser.add_argument(
        "--fixed-router", action="store_true", help="the routers of a mixture of experts train no further"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    require_folder_for(args.out, "OUT")
    if args.config and not args.emerge:
        raise ConfigError("--config says which experts emerge; give a corpus with --emerge, or leave it out.")
    from mocte_ds.convert.hf.imported import import_hf

    facts = import_hf(
        args.folder,
        args.out,
        args.max_positions,
        args.emerge,
        _mocte_block(args.config) if args.config else None,
        args.context,
        args.fixed_router,
        lambda text: print(f"{text} ...", file=sys.stderr, flush=True),
    )
    if args.json:
        print(json.dumps({"path": str(args.out), **facts}))
    else:
        print(
            f"done: {args.out} starts from a {facts['architecture']} with {facts['parameters']:,} parameters; "
            f"{facts['tensors_compared']} tensors equal, logits within {facts['logit_difference']:.1e}; memory "
            f"{facts['peak_bytes'] / 1e6:,.0f} MB at most for {facts['weight_bytes'] / 1e6:,.0f} MB of weights"
        )
        if args.emerge:
            print(f"experts in {len(facts['clusters'])} blocks, from {facts['tokens']:,} tokens of {args.emerge}")
    return 0


def _mocte_block(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("mocte"), dict):
        raise ConfigError(f'{path} is not a DeepSpeed config with a "mocte" block.')
    return values["mocte"]


if __name__ == "__main__":
    run_cli(main)
