"""One run at a time in a run's folder: a second start is refused by name, what a dead process left is taken over."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mocte_ds.errors import MocteError, NotOurs
from mocte_ds.ownership import put, remove
from mocte_ds.ownership import run_lock as module
from mocte_ds.ownership.__main__ import main as remove_by_command
from mocte_ds.ownership.marker import MARKER
from mocte_ds.ownership.run_lock import CAUSE_FILE, LOCK_FILE, require_idle, run_lock
from mocte_ds.training.lost import write_cause


def holding(folder: Path, then: Callable[[], None]) -> int:
    """A process of its own that holds a folder from the return on; its id."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with run_lock(folder):
                os.write(write, b"x")
                then()
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_start_is_refused_by_name_and_a_dead_one_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, {"run.json": b"{}"}, "pretrain")
    child = holding(tmp_path, lambda: time.sleep(60))
    before = (tmp_path / LOCK_FILE).read_bytes()
    try:
        with pytest.raises(MocteError, match=rf"another process runs in .*: process {child} on .* since 2\d\d\d-"):
            with run_lock(tmp_path):
                pass
        assert (tmp_path / LOCK_FILE).read_bytes() == before
    finally:
        kill(child)
    with run_lock(tmp_path) as lock:
        lock.require_held()
        with pytest.raises(MocteError, match=f"process {os.getpid()} on"), run_lock(tmp_path):
            pass
    assert f"the lock of process {child} on" in caplog.text and "is taken over" in caplog.text
    caplog.clear()
    with run_lock(tmp_path):  # after a start that has ended, nothing is to be said
        pass
    assert not caplog.text
    remove(tmp_path)
    assert not tmp_path.exists(), "the lock is ours"


def test_a_folder_is_not_removed_under_a_run(tmp_path: Path) -> None:
    """Neither the run's folder nor the one that holds it, as of the quickstart."""
    run = tmp_path / "out" / "run"
    put(run, {"run.json": b"{}"}, "pretrain")
    child = holding(run, lambda: time.sleep(60))
    try:
        for folder in (run, run.parent):
            with pytest.raises(MocteError, match=f"a run is going on in .*: process {child} on .* Nothing was removed"):
                remove_by_command([str(folder)])
        assert (run / "run.json").is_file()
    finally:
        kill(child)
    require_idle(run.parent)
    remove_by_command([str(run)])
    assert not run.exists()


def foreign(folder: Path) -> None:
    """What a process on another host left."""
    with run_lock(folder):
        facts = json.loads((folder / LOCK_FILE).read_text())
    put(folder, {"run.json": b"{}"}, "pretrain")
    (folder / LOCK_FILE).write_text(json.dumps({**facts, "host": "far", "boot": "another", "pid": 7}))


def test_a_process_on_another_host_lives_as_long_as_it_gives_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system's lock does not reach: the file's time alone decides, by its changes."""
    monkeypatch.setattr(module, "_SILENT", 1.0)
    foreign(tmp_path)
    child = os.fork()
    if child == 0:
        for _ in range(600):
            time.sleep(0.1)
            os.utime(tmp_path / LOCK_FILE)
        os._exit(0)
    try:
        with pytest.raises(MocteError, match="process 7 on far since"), run_lock(tmp_path):
            pass
    finally:
        kill(child)
    with run_lock(tmp_path) as lock:
        lock.require_held()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert "waiting 1 s for a sign of life" in caplog.text and "process 7 on far" in caplog.text


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT", 0.01)
    with run_lock(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (1e9, 1e9))
        deadline = time.monotonic() + 20
        while (tmp_path / LOCK_FILE).stat().st_mtime == 1e9 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 1e9


def test_a_folder_that_goes_away_stops_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for again in (False, True):
        with run_lock(out) as lock:
            lock.require_held()
            out.rename(tmp_path / f"moved{again}")
            if again:
                put(out, {LOCK_FILE: b"of another run"}, "pretrain")
            with pytest.raises(MocteError, match="is not the folder any more that the run began in"):
                lock.require_held()
        assert (out / LOCK_FILE).exists() == again
    shutil.rmtree(out)


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_lock(out):
        write_cause(out, 0, ValueError("x"))
        assert (out / CAUSE_FILE).exists()
    assert not out.exists()
    with run_lock(out):
        (out / "metrics.jsonl").write_text("")
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "metrics.jsonl", LOCK_FILE]
    out = tmp_path / "empty"
    out.mkdir()
    with run_lock(out):
        pass
    assert out.is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "9" * 5000])
def test_a_file_of_somebody_else_is_refused_and_a_torn_one_is_not(content: str, tmp_path: Path) -> None:
    with run_lock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text(content)  # as a kill in the middle of writing leaves it
    if content != '{"pid": "x"}':  # which may be a process of another host
        with run_lock(tmp_path):
            pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOCK_FILE).write_text("mine")
    with pytest.raises(NotOurs), run_lock(tmp_path / "other"):
        pass
    assert (tmp_path / "other" / LOCK_FILE).read_text() == "mine"
