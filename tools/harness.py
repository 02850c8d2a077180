"""Starts lm-evaluation-harness' own command line, which then knows --model mocte --model_args checkpoint=DIR."""

import contextlib
import os
import sys
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError

_OFFLINE = "--offline"


def main(argv: list[str] | None = None) -> int:
    """Command line: lm-eval's, and `--offline FOLDER`, a folder filled by get_benchmarks."""
    words = list(sys.argv[1:] if argv is None else argv)
    folder = None
    if _OFFLINE in words:
        place = words.index(_OFFLINE)
        if place + 1 == len(words):
            raise ConfigError(f"{_OFFLINE} needs a folder.")
        folder = Path(words[place + 1])
        del words[place : place + 2]
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from lm_eval.__main__ import cli_evaluate

    from mocte_ds.dist.end import end_process_groups
    from mocte_ds.evaluation import harness_models  # noqa: F401  registers the model
    from mocte_ds.evaluation.benchmarks import Benchmarks

    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        with contextlib.nullcontext() if folder is None else Benchmarks(folder).serving():
            cli_evaluate()
    finally:
        sys.argv = before
    end_process_groups()
    return 0


if __name__ == "__main__":
    run_cli(main)
