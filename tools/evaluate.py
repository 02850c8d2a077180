"""Evaluates an exported model or a checkpoint with lm-evaluation-harness; tasks that ship need no network."""

import argparse
import json
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import MocteError
from mocte_ds.ownership import put, require_apart, require_ours
from mocte_ds.paths import require_file_for
from mocte_ds.user_files import add_import_option, import_files

_TOOL = "evaluate"
_TASKS = "openbookqa_offline,commonsense_qa_generate"


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. Started by the `deepspeed` launcher, the ranks share the items."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        type=Path,
        help="folder made by tools/export_hf.py (any Hugging Face causal model), or a run's checkpoints",
    )
    parser.add_argument(
        "--tasks",
        default=None,
        help="names of shipped and of lm-eval's own tasks, groups and tags, separated by commas (default: "
        f"{_TASKS}, or none where texts are given)",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=None,
        help="corpus (a file for each domain) whose bits per byte, and loss by place in the context, are shown",
    )
    parser.add_argument(
        "--limit", type=int, default=None, help="items of each task, documents of each domain (default: all)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per forward pass (default: %(default)s)")
    parser.add_argument("--num-fewshot", type=int, default=None, help="examples before each question")
    parser.add_argument(
        "--offline",
        type=Path,
        default=None,
        help="folder filled by tools/get_benchmarks.py: lm-eval's own tasks run from it, without a network, and "
        "mocte-core for 15 of them",
    )
    parser.add_argument("--include-path", type=Path, default=None, help="folder with more lm-eval task files")
    parser.add_argument(
        "--chat-template", action="store_true", help="format questions with the tokenizer's chat template"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="run the programs that the model writes, for humaneval; no sandbox"
    )
    parser.add_argument("--tag", default=None, help="for checkpoints: which one (default: the latest)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=None,
        help="for checkpoints: sentencepiece model, or a folder with a tokenizer.json (default: the one of the run)",
    )
    parser.add_argument(
        "--ep-size",
        type=int,
        default=None,
        help="for checkpoints: ranks that share the experts (default: all; 1: every rank has all of them and its "
        "share of the items)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="write the results as JSON; an earlier file of this tool is replaced, no other one",
    )
    add_import_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    import_files(args.imports)
    if args.output is not None:
        require_file_for(args.output, "--output")
        # On every rank, before any of them waits for another.
        require_apart(args.output, args.model)
        require_ours(args.output.parent, [args.output.name], _TOOL)
    from mocte_ds.dist.end import end_process_groups
    from mocte_ds.evaluation.lm import evaluate, table
    from mocte_ds.evaluation.replicas import join_ranks
    from mocte_ds.evaluation.texts import texts_table

    join_ranks()
    tasks = args.tasks if args.tasks is not None else "" if args.texts else _TASKS
    given = {"tag": args.tag, "tokenizer": args.tokenizer, "ep_size": args.ep_size}
    results = evaluate(
        args.model,
        [task for task in tasks.split(",") if task],
        args.limit,
        args.batch_size,
        num_fewshot=args.num_fewshot,
        include_path=args.include_path,
        offline=args.offline,
        run_code=args.run_code,
        chat_template=args.chat_template,
        model_args={name: value for name, value in given.items() if value is not None},
        texts=args.texts,
    )
    if results:
        parts = [table(results)] if results["tasks"] else []
        parts += [texts_table(results["texts"])] if args.texts else []
        print(json.dumps(results) if args.json else "\n\n".join(parts), flush=True)
        if args.output:
            _write(args.output, json.dumps(results, indent=1) + "\n")
    end_process_groups()
    return 0


def _write(path: Path, text: str) -> None:
    try:
        put(path.parent, {path.name: text.encode()}, _TOOL)
    except OSError as error:
        reason = error.strerror or error
        raise MocteError(f"could not write {path}: {reason}; the results are printed above.") from error


if __name__ == "__main__":
    run_cli(main)
