"""Nobody waits for a process that was killed while it compiled."""

import fcntl
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from mocte_ds.training import cpu_op


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / cpu_op.NAME
    folder.mkdir()
    (folder / f"{cpu_op.NAME}.so").write_bytes(b"")
    return folder


def test_an_old_lock_is_removed(built: Path) -> None:
    lock = built / "lock"
    lock.write_bytes(b"")
    os.utime(lock, (time.time() - 60, time.time() - 60))
    assert cpu_op.build_cpu_op() is False
    assert not lock.exists()


def test_a_young_lock_may_belong_to_a_loader(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = built / "lock"
    lock.write_bytes(b"")
    seen = []

    def loader_ends(_seconds: float) -> None:
        seen.append(lock.exists())
        lock.unlink(missing_ok=True)

    monkeypatch.setattr(cpu_op.time, "sleep", loader_ends)
    assert cpu_op.build_cpu_op(built.parent) is False
    assert seen == [True]


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
