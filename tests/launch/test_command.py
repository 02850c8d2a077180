"""The console command finds the tools of the installed package and passes their options and errors on."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

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


def complete(*words: str) -> list[str]:
    """What bash offers for the last of the words."""
    typed = " ".join(f"'{word}'" for word in ("mocte-ds", *words))
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _mocte_ds; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    text = f"{command('completion', 'bash').stdout}\ncd {ROOT / 'launch'}\n{ask}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_completion() -> None:
    assert complete("prep") == ["prepare_data"] and "--version" in complete("--")
    assert complete("prepare-data", "--valid") == ["--validation-share"]
    assert {"--processes", "--stop-after", "--set"} <= set(complete("pretrain", "--"))
    assert "--local_rank" not in complete("pretrain", "--")
    assert complete("pretrain", "--run", "gpt-1") == ["gpt-140m"]
    assert complete("report", "run") == ["runs"], "a file of the folder"
    done = command("completion", "fish")
    assert done.returncode == 2 and "shells: bash, zsh" in done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_completion_in_zsh(tmp_path: Path) -> None:
    """What stands in the line after the tab key, in a zsh with a terminal of its own."""
    (tmp_path / "completion").write_text(command("completion", "zsh").stdout, encoding="utf-8")
    lines = ["mocte-ds prepare-data --valid\\t", "mocte-ds pretrain --run gpt-1\\t", "mocte-ds quick\\t"]
    text = "zmodload zsh/zpty; zpty z zsh -f -i\nzpty -w z '. ./completion; mocte-ds() { print -r -- $* >> words; }'\n"
    text += "".join(f"zpty -w z $'{line}'\n" for line in [*lines, "exit"]) + "while zpty -r z; do :; done\n"
    environment = {**os.environ, "ZDOTDIR": str(tmp_path), "TERM": "xterm"}
    done = subprocess.run(
        ["zsh", "-f", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    wanted = "prepare-data --validation-share\npretrain --run gpt-140m\nquickstart\n"
    assert (tmp_path / "words").is_file(), done.stdout + done.stderr
    assert (tmp_path / "words").read_text(encoding="utf-8") == wanted, done.stdout


def test_errors() -> None:
    done = command("prepare_date")
    assert done.returncode == 2 and "no tool prepare_date. Did you mean 'prepare_data'?" in done.stderr
    done = command("prepare_data", "--out", "nowhere", "--tokenizer", "none.model")
    assert done.returncode == 2 and "none.model: no such tokenizer" in done.stderr
