"""Programs started on this machine: what they are told, and that a signal ends all that they started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocte_ds.hosts import local

PARENT = "import os, sys; from mocte_ds.hosts import local; sys.exit(local.run(sys.argv[1:], os.environ))"
CHILD = """trap 'echo saved; exit 3' INT TERM HUP
touch {folder}/ready
for i in $(seq 600); do sleep 0.1; done"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_program_which_may_save(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, "bash", "-c", CHILD.format(folder=tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "ready").exists():
                assert time.monotonic() < deadline and parent.poll() is None
                time.sleep(0.05)
            parent.send_signal(number)
            output, _ = parent.communicate(timeout=60)
        finally:
            parent.kill()
    assert (parent.returncode, output) == (3, "saved\n")


def test_exit_codes() -> None:
    assert local.run(["bash", "-c", "exit 5"], os.environ) == 5
    assert local.run(["bash", "-c", "kill -9 $$"], os.environ) == 137


def test_one_process_for_each_gpu_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, wanted, at_most_two in ((0, 2, 2), (1, 1, 1), (8, 8, 2)):
        monkeypatch.setattr(local, "gpus", lambda there=gpus: there)
        assert (local.usual_count(), local.usual_count(2)) == (wanted, at_most_two)
    command = local.command(Path("script.py"), ["--out", "x"], 2, range(2, 4))
    assert command[-5:] == ["--include", "localhost:2,3", "script.py", "--out", "x"]
    assert local.command(Path("script.py"), [], 2)[-3:] == ["--num_accelerators", "2", "script.py"]


def test_processes_share_the_cores_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(local, "gpus", lambda: 0)
    found = local.environment(2)
    assert (found["DS_ACCELERATOR"], found["OMP_NUM_THREADS"]) == ("cpu", "4")
    assert local.environment(16)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.environment(2)["OMP_NUM_THREADS"] == "3", "what the user says holds"
    monkeypatch.setattr(local, "gpus", lambda: 1)
    assert "DS_ACCELERATOR" not in local.environment(1)
