"""`mocte-ds pretrain` finds run files by name, passes options on, and is one of the ranks under a launcher."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mocte_ds.errors import ConfigError
from mocte_ds.hosts import local
from tools.pretrain import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would be started; each ends with code 5."""
    commands: list[list[str]] = []

    def run(words: Sequence[str], _values: object) -> int:
        commands.append(list(words))
        return 5

    monkeypatch.setattr(local, "run", run)
    monkeypatch.delenv("RANK", raising=False)
    return commands


def test_passes_all_on(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--run-file", "gpt-140m", "--set", "a.b=1", "--processes", "3", "--set", "c.d=2", "--verbose"]) == 5
    script, runs = ROOT / "launch" / "pretrain.py", ROOT / "launch" / "runs"
    wanted = ["3", str(script), "--run", str(runs / "gpt-140m.yaml"), "--set", "a.b=1", "--set", "c.d=2", "--verbose"]
    assert started[0][-9:] == wanted
    monkeypatch.setattr(local, "gpus", lambda: 8)
    main(["--run", "some/where.yaml"])
    assert started[1][-4:] == ["8", str(script), "--run", "some/where.yaml"]


def test_refuses_before_anything_starts(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gpt-140m'"):
        main(["--run", "gpt-14m"])
    with pytest.raises(ConfigError, match="--processes 0 must lie"):
        main(["--run", "gpt-140m", "--processes", "0"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="a launcher has started this process already"):
        main(["--run", "gpt-140m", "--processes", "2"])
    assert not started


def test_under_a_launcher_it_is_a_rank(tmp_path: Path) -> None:
    """The rank looks for the run's data, which are not there; a launcher of its own would have begun by now."""
    command = [sys.executable, ROOT / "tools" / "pretrain.py", "--run", "gpt-140m", "--out", tmp_path / "out"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "data/gpt" in done.stderr and "launch.py" not in done.stdout + done.stderr
