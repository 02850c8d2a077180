"""Writes the shipped lm-eval tasks into a folder and prints it: lm_eval --include_path $(mocte-ds tasks) ..."""

import argparse
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.evaluation.task_files import MODEL, model_file, task_files, usual_folder
from mocte_ds.ownership import put
from mocte_ds.paths import require_folder_for

_TOOL = "tasks"


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"{MODEL} in it makes --model mocte known where it stands among the tasks: lm_eval --model mocte "
        f"--model_args checkpoint=DIR --tasks $(mocte-ds tasks)/{MODEL},openbookqa_offline "
        "--include_path $(mocte-ds tasks)",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="folder to write (default: one below ~/.cache/mocte_ds/tasks)"
    )
    args = parser.parse_args(argv)
    files = {**task_files(), **model_file()}
    folder = (args.folder or usual_folder(files)).absolute()
    require_folder_for(folder, "FOLDER")
    put(folder, files, _TOOL)
    print(folder)
    return 0


if __name__ == "__main__":
    run_cli(main)
