"""The command line tools/report.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.report.synthetic import write_run

ROOT = Path(__file__).resolve().parents[2]


def tool(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the tool as a user does."""
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_json_is_one_object(tmp_path: Path) -> None:
    logs = write_run(tmp_path, steps=12, budget=60, emergences=False)
    done = tool(tmp_path, "--json", "--out", tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["page"] == str(tmp_path / "elsewhere" / "index.html")
    assert result["tokens"] == logs["metrics"][-1]["tokens"] and result["budget"] == 60
    assert set(result["missing"]) == {"projection", "domains", "load", "trainability"}
    assert all(Path(path).is_file() for path in [result["page"], *result["figures"].values()])
    assert "figures" in done.stderr, "the progress bar"


def test_text_says_what_happened_and_where_the_page_is(tmp_path: Path) -> None:
    write_run(tmp_path, steps=2, budget=60, emergences=False)
    done = tool(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 60 optimizer steps" in done.stdout
    assert "no figure 'projection': documents are projected" in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'report' / 'index.html'}"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "it has no metrics.jsonl. Give the folder that launch/pretrain.py wrote"),
        (lambda folder: (folder / "metrics.jsonl").write_text("{"), "has no readable step"),
        (lambda folder: folder.rmdir(), "is not a folder"),
    ],
)
def test_a_folder_without_a_run_is_an_error_that_says_what_to_do(tmp_path: Path, prepare: Any, message: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    prepare(folder)
    done = tool(folder)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, steps=2, budget=60)
    (tmp_path / "file").write_text("")
    done = tool(tmp_path, "--out", tmp_path / "file" / "report")
    assert done.returncode == 2
    assert "is a file, and a folder is needed" in done.stderr and "--out" in done.stderr
