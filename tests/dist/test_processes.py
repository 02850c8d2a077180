"""Ranks that fail, hang or start others: they are named, their stacks are shown, and nothing of them is left."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mocte_ds.dist.processes import RanksFailed, run_processes, run_ranks
from mocte_ds.errors import ConfigError
from tests.spawn import spawn

STARTER = """
import sys
from tests.dist.test_processes import sleep_for_ever
from mocte_ds.dist.processes import run_processes
if __name__ == "__main__":
    run_processes(sleep_for_ever, [(sys.argv[1],)], 100.0, [{}])
"""


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason of rank 1")
    dist.barrier()


def sleep_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def start_another(folder: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (Path(folder) / str(dist.get_rank())).write_text(str(child.pid))
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def refuse_on_one() -> None:
    if dist.get_rank() == 1:
        raise ConfigError("key = 3 is not allowed")
    dist.barrier()


def leave(code: object) -> None:
    sys.exit(code)


def sleep_for_ever(file: str) -> None:
    Path(f"{file}.partial").write_text(str(os.getpid()))
    os.rename(f"{file}.partial", file)
    time.sleep(600)


def runs(pid: int) -> bool:
    """Whether a process is there and not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not runs(pid)


def test_a_failing_rank_is_named_and_others_do_not_hang() -> None:
    with pytest.raises(RanksFailed, match=r"^rank 1 failed with exit code 1\n(.|\n)*the reason of rank 1"):
        spawn(fail_on_one, 2)


def test_a_hanging_rank_shows_its_stack() -> None:
    with pytest.raises(RanksFailed, match=r"did not end within 8 s(.|\n)*sleep_on_one"):
        spawn(sleep_on_one, 2, timeout=8.0)


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(RanksFailed, match="module level"):
        spawn(lambda: 1, 2)


def test_a_message_for_the_user_stands_alone() -> None:
    with pytest.raises(RanksFailed, match=r"^key = 3 is not allowed$") as caught:
        spawn(refuse_on_one, 2)
    assert re.search("ConfigError: key = 3 .*\n", str(caught.value.__cause__)), "the whole story is its cause"


def test_what_ranks_have_started_ends_with_them(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 failed with exit code -9(.|\n)*rank 1, exit code none: killed"):
        spawn(start_another, 2, str(tmp_path), grace=0.2)
    # What the dead rank has started belongs to its group, which is killed too.
    assert all(ended(int((tmp_path / str(rank)).read_text())) for rank in range(2))


def test_processes_end_with_the_one_that_has_started_them(tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(STARTER, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[2])
    starter = subprocess.Popen([sys.executable, tmp_path / "start.py", tmp_path / "pid"], cwd=root, env=paths(root))
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "pid").exists() and starter.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert runs(pid)
    finally:
        starter.kill()
        starter.wait()
    assert ended(pid)


def paths(root: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (None, 0), (3, 3), ("a message", 1)])
def test_exit_codes_are_those_of_an_interpreter(code: object, expected: int, tmp_path: Path) -> None:
    found = run_processes(leave, [(code,)], 60.0, [{}], [str(tmp_path / "log")], ["torch"])
    assert found.codes == [expected] and bool(found.problem) is bool(expected) and not found.late
    assert (tmp_path / "log").read_text() == ("a message\n" if code == "a message" else "")


def test_another_device_than_deepspeeds_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(RanksFailed, match="failed with exit code 1"):
        run_ranks(torch.cuda.current_device, 1, timeout=100.0, device="cuda")
