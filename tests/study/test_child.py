"""A program that is ended takes all that it started with it; nothing writes into a run's folder afterwards."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mocte_ds.study import child
from mocte_ds.study.child import Job, run_jobs


def test_exit_codes_and_output_after_what_is_there(tmp_path: Path) -> None:
    log, codes = tmp_path / "log", {}
    log.write_text("before\n", encoding="utf-8")
    command = ["bash", "-c", "echo $WORD; echo wrong >&2; exit 3"]
    job = Job("one", lambda place: (command, {**os.environ, "WORD": f"out{place}"}), log)
    run_jobs([job], 1, lambda done, code: codes.update({done.name: code}))
    assert codes == {"one": 3} and log.read_text(encoding="utf-8") == "before\nout0\nwrong\n"


def test_several_at_once_each_in_a_place_of_its_own(tmp_path: Path) -> None:
    """Two wait for each other's file, which they can only do side by side; the third one takes a free place."""
    places: dict[str, int] = {}
    asked: list[str] = []

    def job(name: str, other: str) -> Job:
        wait = f"for i in $(seq 300); do [ -e {tmp_path}/{other} ] && exit 0; sleep 0.1; done; exit 9"

        def start(place: int) -> tuple[list[str], dict[str, str]]:
            places[name] = place
            return ["bash", "-c", f"touch {tmp_path}/{name}; {wait}"], dict(os.environ)

        return Job(name, start, tmp_path / f"{name}.log")

    def jobs() -> Iterator[Job]:
        for name, other in (("a", "b"), ("b", "a"), ("c", "c")):
            asked.append(name)
            yield job(name, other)

    def finished(done: Job, code: int) -> None:
        assert code == 0
        if not ended:
            assert len(asked) == 2, "the next one is asked for when a place is free"
        ended.append(done.name)

    ended: list[str] = []
    run_jobs(jobs(), 2, finished)
    assert {places["a"], places["b"]} == {0, 1} and places["c"] in (0, 1) and sorted(ended) == ["a", "b", "c"]


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    def job(name: str, code: str) -> Job:
        return Job(name, lambda _place: (["bash", "-c", code], dict(os.environ)), tmp_path / f"{name}.log")

    def finished(done: Job, code: int) -> None:
        raise ValueError(f"{done.name} {code}")

    slow = "trap 'echo saved; exit' TERM; echo ready; while true; do sleep 0.1; done"
    wait = f"for i in $(seq 300); do grep -q ready {tmp_path}/slow.log && exit 5; sleep 0.1; done"
    with pytest.raises(ValueError, match="bad 5"):
        run_jobs([job("slow", slow), job("bad", wait)], 2, finished)
    words = (tmp_path / "slow.log").read_text(encoding="utf-8").split()
    assert words[0] == "ready" and words[-1] == "saved"


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
command = ['bash', '-c', 'bash -c "$RANK_CODE" & wait']
job = child.Job('some', lambda place: (command, os.environ), pathlib.Path({str(log)!r}))
child.run_jobs([job], 1, lambda job, code: None)
"""
    environment = {**os.environ, "RANK_CODE": rank}
    tool = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    deadline, behind = time.monotonic() + 60, None
    try:
        while behind is None and time.monotonic() < deadline:
            words = log.read_text(encoding="utf-8").split() if log.exists() else []
            behind = int(words[0]) if "ready" in words else None
            time.sleep(0.05)
        assert psutil.pid_exists(behind)
        if when == "while it runs":
            time.sleep(0.5)
        tool.send_signal(number)
        assert b"KeyboardInterrupt" in tool.communicate(timeout=60)[1]
        assert not psutil.pid_exists(behind) and "saved" in log.read_text(encoding="utf-8")
    finally:
        tool.kill()
        if behind is not None and psutil.pid_exists(behind):
            os.kill(behind, signal.SIGKILL)


def test_what_a_killed_launcher_leaves_is_ended_too(tmp_path: Path) -> None:
    """The program in front is killed, the one that it has started lives on in its group."""
    log, codes = tmp_path / "log", []
    code = "bash -c 'echo $$; sleep 300' & sleep 0.5; kill -9 $$"
    run_jobs(
        [Job("one", lambda _place: (["bash", "-c", code], dict(os.environ)), log)], 1, lambda _, c: codes.append(c)
    )
    assert codes == [-signal.SIGKILL] and not psutil.pid_exists(int(log.read_text(encoding="utf-8").split()[0]))


def test_a_signal_while_results_are_written_is_not_lost(tmp_path: Path) -> None:
    job = Job("one", lambda _place: (["true"], dict(os.environ)), tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], 2, lambda _job, _code: os.kill(os.getpid(), signal.SIGTERM))
