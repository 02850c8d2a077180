"""Exports a checkpoint to Hugging Face format: a stock class or our own, checked before it reports success."""

import argparse
import json
import sys
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.paths import require_folder_for
from mocte_ds.user_files import add_import_option, import_files


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints folder, or one tag in it")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default=None,
        help="data type (default: fp32; as stored for an import without training or your own script's model)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=None,
        help="sentencepiece model, or a folder with a tokenizer.json (default: the one that launch/pretrain.py trained "
        "with; none for your own script)",
    )
    parser.add_argument(
        "--class",
        choices=("auto", "stock", "own"),
        default="auto",
        dest="choice",
        help="a class of transformers, the project's own, whose code goes with the weights, or the first if it fits "
        "exactly (default: %(default)s)",
    )
    add_import_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    require_folder_for(args.out, "OUT")
    import_files(args.imports)
    from mocte_ds.convert.hf.export import export

    facts = export(
        args.checkpoint,
        args.out,
        args.dtype,
        args.tokenizer,
        lambda text: print(f"{text} ...", file=sys.stderr, flush=True),
        args.choice,
    )
    if args.json:
        print(json.dumps({"path": str(args.out), **facts}))
    else:
        print(
            f"done: {args.out} is a {facts['architecture']} with {facts['parameters']:,} parameters; "
            f"{facts['tensors_compared']} tensors and {facts['experts_compared']} experts equal, "
            f"logits within {facts['logit_difference']:.1e}; memory {facts['peak_bytes'] / 1e6:,.0f} MB at most for "
            f"{facts['checkpoint_bytes'] / 1e6:,.0f} MB of weights"
        )
        for kind, file in facts["user_keys"].items():
            print(f"{file} there is a copy of the file of your routing key {kind}")
        if facts["reason"]:
            print(f"no stock class: {facts['reason']}")
            print("load it with trust_remote_code=True, or after import mocte_ds.convert.hf.register")
    return 0


if __name__ == "__main__":
    run_cli(main)
