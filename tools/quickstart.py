"""From raw text to an evaluated model: tokenizer, data, training on 2 processes, export, evaluation, report."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.hosts import local
from mocte_ds.ownership import remove
from mocte_ds.ownership.run_lock import require_idle
from mocte_ds.paths import require_folder_for
from mocte_ds.shipped import LAUNCH, TOOLS

_STEPS, _TASKS = 6, "openbookqa_offline,commonsense_qa_generate"
_END = """
done in {seconds:.0f} s. Everything is in {out}:
  report/index.html         what happened, with pictures
  export/                   the model in Hugging Face format
  evaluation/results.json   lm-eval's numbers
  metrics.jsonl             a line per step;  events.jsonl: checks, emergence, freezing;  run.json: all settings
  checkpoints/              to go on training;  tensorboard/: for tensorboard --logdir {quoted}/tensorboard"""


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. What is there already is used again; an interrupted run goes on."""
    parser = argparse.ArgumentParser(
        description=__doc__ + " About 5 minutes on two CPU cores.",
        epilog="All other options are those of launch/pretrain.py, e.g. --set training.steps=100. EVAL_LIMIT=N in the "
        "environment: items of each evaluation task.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove the earlier run first; refused where the folder holds anything else",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="the run's folder (default: %(default)s)"
    )
    args, options = parser.parse_known_args(argv)
    started, out, processes = time.monotonic(), args.out, local.usual_count(2)
    require_folder_for(out, "--out")
    options = [*_of_this_machine(processes), *options]
    if args.fresh:
        require_idle(out)
        remove(out)
    # Nothing here needs a network, and waiting for one takes minutes.
    values = {**local.environment(processes), "HF_HUB_OFFLINE": "1"}

    def tool(name: str, *words: object) -> None:
        _run([sys.executable, str(TOOLS / f"{name}.py"), *map(str, words)], values)

    def on_ranks(name: str, *words: object) -> None:
        _run(local.command(LAUNCH / f"{name}.py", [*map(str, words)], processes), values)

    _say(1, "tokenizer")
    tool("train_tokenizer", "--out", out / "tokenizer.model", "--vocab-size", 2048, "--if-missing")
    _say(2, "data")
    tool("prepare_data", "--out", out / "data", "--tokenizer", out / "tokenizer.model")
    _say(3, f"training on {processes} process{'es' if processes > 1 else ''}")
    prepared = f"data.prepared={json.dumps(str(out / 'data'))}"  # as YAML: a name like 'a #1' must stay a name
    on_ranks("pretrain", "--run", LAUNCH / "runs" / "quickstart.yaml", "--out", out, "--set", prepared, *options)
    _say(4, "export to Hugging Face format")
    exported, results = out / "export" / "export.json", out / "evaluation" / "results.json"
    if not _found(exported, out / "checkpoints" / "latest", exported.parent):
        tool("export_hf", out / "checkpoints", out / "export")
    _say(5, "lm-evaluation-harness: one task of classification, one of generation")
    if not _found(results, exported, results):
        limit = ["--limit", os.environ["EVAL_LIMIT"]] if os.environ.get("EVAL_LIMIT") else []
        on_ranks("evaluate", exported.parent, "--tasks", _TASKS, *limit, "--output", results)
    _say(6, "report")
    tool("report", out)
    print(_END.format(seconds=time.monotonic() - started, out=out, quoted=shlex.quote(str(out))))
    return 0


def _of_this_machine(processes: int) -> list[str]:
    """Options of the training that its processor and the number of processes ask for."""
    import torch

    options = []
    # Without instructions for it a product in bf16 takes about twenty times as long as in fp32.
    if not local.gpus() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("this CPU has no instructions for bf16: training in fp32")
        options += ["--set", "deepspeed.bf16.enabled=false"]
    if processes == 1:
        options += ["--set", "deepspeed.mocte.ep_size=1"]
    return options


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/{_STEPS}] {what}", flush=True)


def _found(made: Path, of: Path, shown: Path) -> bool:
    """Whether something was made after what it is made of; then says so."""
    found = made.is_file() and (not of.exists() or made.stat().st_mtime > of.stat().st_mtime)
    if found:
        print(f"found {shown}", flush=True)
    return found


def _run(words: Sequence[str], values: dict[str, str]) -> None:
    """Run a step; where it fails it has said why, and this ends with its exit code."""
    if code := local.run(words, values):
        sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
