"""The console command finds the tools of the installed package and passes their options and errors on."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess:
    """Outside of the repository, as installed."""
    program = Path(sys.executable).parent / "mocte-ds"
    return subprocess.run([program, *arguments], cwd="/", capture_output=True, text=True, timeout=60)


def test_lists_every_tool() -> None:
    done = command("--help")
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "tools").glob("[!_]*.py"):
        assert f"  {path.stem} " in done.stdout


def test_passes_options_on() -> None:
    done = command("prepare-data", "--help")
    assert done.returncode == 0 and "--validation-share" in done.stdout and "mocte-ds prepare_data" in done.stdout


def test_version() -> None:
    done = command("--version")
    assert done.returncode == 0 and done.stdout == f"mocte-ds {metadata.version('mocte-ds')}\n"


def test_errors() -> None:
    done = command("prepare_date")
    assert done.returncode == 2 and "no tool prepare_date. Did you mean 'prepare_data'?" in done.stderr
    done = command("prepare_data", "--out", "nowhere", "--tokenizer", "none.model")
    assert done.returncode == 2 and "none.model: no such tokenizer" in done.stderr
