"""A program that is ended takes all that it started with it; nothing writes into a run's folder afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mocte_ds.sweep import child
from mocte_ds.sweep.child import run_to_end


def test_exit_code_and_output_behind_what_is_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n", encoding="utf-8")
    command = ["bash", "-c", "echo $WORD; echo wrong >&2; exit 3"]
    assert run_to_end(command, log, {**os.environ, "WORD": "out"}) == 3
    assert log.read_text(encoding="utf-8") == "before\nout\nwrong\n"


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGINT, "while it runs"), (signal.SIGTERM, "while it runs"), (signal.SIGTERM, "while it starts")],
)
def test_ends_with_everything_that_it_started(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """As a launcher does it: a program in front, one behind it that saves before it ends."""
    log = tmp_path / "log"
    rank = "trap 'sleep 0.5; echo saved; exit' TERM; echo $$ ready; while true; do sleep 0.1; done"
    code = f"""
import os, pathlib, subprocess, sys, time
sys.path.insert(0, {str(Path(child.__file__).parent)!r})
import child  # without the package, which takes seconds to import

class Slow(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        time.sleep({1.5 if when == "while it starts" else 0})

subprocess.Popen = Slow
child.run_to_end(['bash', '-c', 'bash -c "$RANK_CODE" & wait'], pathlib.Path({str(log)!r}), os.environ)
"""
    environment = {**os.environ, "RANK_CODE": rank}
    sweep = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    deadline, behind = time.monotonic() + 60, None
    try:
        while behind is None and time.monotonic() < deadline:
            words = log.read_text(encoding="utf-8").split() if log.exists() else []
            behind = int(words[0]) if "ready" in words else None
            time.sleep(0.05)
        assert psutil.pid_exists(behind)
        if when == "while it runs":
            time.sleep(0.5)
        sweep.send_signal(number)
        assert b"KeyboardInterrupt" in sweep.communicate(timeout=60)[1]
        assert not psutil.pid_exists(behind) and "saved" in log.read_text(encoding="utf-8")
    finally:
        sweep.kill()
        if behind is not None and psutil.pid_exists(behind):
            os.kill(behind, signal.SIGKILL)
