"""Nobody waits for a process that was killed while it compiled."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from mocte_ds.dist import cpu_op

HOLD = """import sys, time
from mocte_ds.dist.cpu_op import KernelBaton
KernelBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / cpu_op.NAME
    folder.mkdir()
    (folder / f"{cpu_op.NAME}.so").write_bytes(b"")
    (folder / cpu_op.STAMP).write_text(cpu_op._environment(), encoding="utf-8")
    return folder


def test_torch_builds_under_a_lock_that_the_system_frees(tmp_path: Path) -> None:
    """A living holder is waited for, however old its lock is; a killed one is not, and its place is taken."""
    lock = tmp_path / "lock"
    lock.write_bytes(b"")  # torch's own, left by a process that was killed
    os.utime(lock, (0, 0))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        baton = cpu_op.KernelBaton(str(lock), wait_seconds=0.1)
        second = threading.Thread(target=baton.try_acquire, daemon=True)
        second.start()
        second.join(0.5)
        assert second.is_alive(), "it waits for the living holder"
        holder.kill()
        second.join(20)
    assert not second.is_alive()
    baton.release()
    cpu_op.use_kernel_lock()
    assert torch.utils.cpp_extension.FileBaton is cpu_op.KernelBaton


PLAIN = """import os, sys, time
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)  # as torch.utils.file_baton does
print("held", flush=True)
time.sleep(60)
"""


def test_a_plain_process_that_builds_in_the_same_folder_is_waited_for_and_waits(tmp_path: Path) -> None:
    """It takes torch's file and knows nothing of our lock: both would write the same object files."""
    lock = tmp_path / "lock"
    plain, ours = FileBaton(str(lock)), cpu_op.KernelBaton(str(lock))
    ours.try_acquire()
    assert plain.try_acquire() is False, "it waits until our file is gone"
    ours.release()
    assert plain.try_acquire() is True
    waiting = threading.Thread(target=ours.try_acquire, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    plain.release()
    waiting.join(20)
    assert not waiting.is_alive()
    ours.release()
    with subprocess.Popen([sys.executable, "-c", PLAIN, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert lock.exists(), "torch's own would wait for this file for ever"
    assert ours.try_acquire() is True
    ours.release()
    assert not lock.exists()


def test_what_is_built_for_this_environment_is_used(built: Path) -> None:
    (built / "lock").write_bytes(b"")
    assert cpu_op.build_cpu_op(built.parent) is False


def test_what_was_built_for_another_environment_is_built_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (built / cpu_op.STAMP).write_text("torch 1.0\nin /another/venv", encoding="utf-8")
    started = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess:
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(cpu_op.subprocess, "run", run)
    assert cpu_op.build_cpu_op(built.parent) is True and len(started) == 1
    assert cpu_op.build_cpu_op(built.parent) is False and len(started) == 1


def test_builders_wait_for_each_other(built: Path) -> None:
    with open(built.parent / "build.flock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        other = threading.Thread(target=cpu_op.build_cpu_op, args=(built.parent,))
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_a_compiler_that_the_system_killed_gets_another_try_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    jobs = []

    def run(command: list[str], env: dict[str, str], **_options: object) -> subprocess.CompletedProcess:
        jobs.append(env.get("MAX_JOBS"))
        short = len(jobs) == 1
        return subprocess.CompletedProcess(command, int(short), "c++: fatal error: Killed signal" if short else "", "")

    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(cpu_op.subprocess, "run", run)
    assert cpu_op.build_cpu_op() is True
    assert jobs == [None, "1"]


def test_a_lock_of_another_users_process_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, listed = tmp_path / "lock", os.listdir

    def hidden(path: str) -> list[str]:
        if str(path).startswith("/proc/"):
            raise PermissionError(path)
        return listed(path)

    lock.touch()
    assert not cpu_op._is_open(lock)
    with lock.open():
        assert cpu_op._is_open(lock)
    monkeypatch.setattr(os, "listdir", hidden)
    assert cpu_op._is_open(lock)
    os.utime(lock, (1.0, 1.0))
    assert not cpu_op._is_open(lock), "nobody builds for so long"
