"""A rank that stands still: real processes of a gloo group end, and the message names rank, host and phase."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mocte_ds.dist.processes import run_processes
from mocte_ds.errors import NotOurs
from mocte_ds.ownership.proof import strangers
from mocte_ds.watch.heartbeat import Heartbeat
from mocte_ds.watch.watchdog import EXIT_STALLED, FOLDER, Watchdog, note_folder, require_own_folder, tell
from tests.spawn import PRELOADED, free_port

LIMIT, TURN = 1.5, 0.3
HOST = socket.gethostname()


def rank_of(case: str, rank: int, port: int, folder: Path) -> None:
    """Two ranks in step, until rank 1 gets no further in step 3."""
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    heart = Heartbeat()
    dog = Watchdog(folder, rank, 2, case, LIMIT, 30.0, lambda _: "Checkpoint step2 is good.", TURN, heart)
    if rank == 0:
        note_folder(folder)
    dog.begin()
    for step in range(1, 5):
        heart.begin_step(step)
        with heart.phase("forward"):
            if rank == 1 and step == 3 and case == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if rank == 1 and step == 3 and case == "stuck":
                with heart.phase("reading"):
                    time.sleep(60)
        with heart.phase("reduction", waits=True):
            dist.all_reduce(torch.ones(1))
        if case == "well" and step == 3:
            with heart.phase("checkpoint", long=True):
                time.sleep(2.5 * LIMIT)
    dog.end()
    os._exit(0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int | None]]]:
    """Folder and exit codes of every case; all run at once. A stopped process is killed, as launchers do."""

    def run(case: str) -> tuple[Path, list[int | None]]:
        folder, port = tmp_path_factory.mktemp(case), free_port()
        logs, grace = [str(folder / f"log_{rank}") for rank in range(2)], 0.2 if case == "stopped" else 30.0
        arguments = [(case, rank, port, folder) for rank in range(2)]
        return folder, run_processes(rank_of, arguments, 60.0, [{}, {}], logs, PRELOADED, grace).codes

    cases = ("stopped", "stuck", "well")
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


def test_a_stopped_process(ended: dict) -> None:
    folder, codes = ended["stopped"]
    told = (folder / "log_0").read_text()
    assert codes == [EXIT_STALLED, None], told
    assert told.count("error: the run stands still: rank 1 ") == 1 and f"on {HOST} was last seen in step " in told
    assert "no sign of life" in told and told.rstrip().endswith("Checkpoint step2 is good.")
    assert "all_reduce" in (folder / FOLDER / "stacks_0.txt").read_text()


def test_a_rank_that_the_others_wait_for(ended: dict) -> None:
    folder, codes = ended["stuck"]
    logs = [(folder / f"log_{rank}").read_text() for rank in range(2)]
    assert codes == [EXIT_STALLED, EXIT_STALLED], logs
    assert "rank 1 " in logs[0] and "stands in step 3, forward > reading, since 20" in logs[0], logs
    assert "the others have come further and wait" in logs[0] and logs[1].count("error:") == 0, logs
    stacks = [(folder / FOLDER / f"stacks_{rank}.txt").read_text() for rank in range(2)]
    assert "all_reduce" in stacks[0] and "rank_of" in stacks[1] and "reading" in stacks[1]


def test_a_long_phase_and_a_run_that_ends_well(ended: dict) -> None:
    folder, codes = ended["well"]
    assert codes == [0, 0], [(folder / f"log_{rank}").read_text() for rank in range(2)]
    assert not list((folder / FOLDER).glob("verdict_*"))


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    require_own_folder(tmp_path / "none")
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(NotOurs, match=FOLDER):
        require_own_folder(tmp_path)
    dog = Watchdog(tmp_path / "run", 0, 1, "x", 9.0, 9.0, str)
    note_folder(tmp_path / "run")
    dog.begin()
    dog.end()
    require_own_folder(tmp_path / "run")
    assert not list(strangers(tmp_path / "run"))


def record(rank: int, beats: int, count: int) -> dict:
    facts = {"rank": rank, "host": "node", "pid": 7, "beats": beats, "count": count, "step": 3}
    return {**facts, "phase": "backward > experts of x > all-to-all", "since": 0.0}


def test_all_ranks_in_one_place() -> None:
    before = {rank: record(rank, 1, 40) for rank in range(6)}
    text = tell(before, {rank: record(rank, 4, 40) for rank in range(6)}, 6)
    assert "and 2 more ranks" in text and "all ranks stand there" in text and "\n" not in text
    assert "rank 1 has never given a sign of life" in tell({}, {0: record(0, 1, 40)}, 2)
    uneven = {rank: record(rank, 4, 40 + rank) for rank in range(3)}
    assert "all ranks stand there" in tell(before, uneven, 3), "other numbers of exchanges before it"
    uneven[1]["phase"] = "data"
    assert "still: rank 1 (process" in tell(before, uneven, 3) and "others have come further" in tell(before, uneven, 3)
    assert "it gets no further" in tell({0: record(0, 1, 4)}, {0: record(0, 2, 4)}, 1)


def test_phases() -> None:
    heart = Heartbeat()
    with heart.phase("backward"):
        time.sleep(0.02)
        with heart.phase("all-to-all", waits=True):
            assert heart.place.name == "backward > all-to-all" and not heart.place.long
            time.sleep(0.2)
        assert heart.place.name == "backward"
        with heart.phase("check", long=True), heart.phase("sample"):
            assert heart.place.long
            time.sleep(0.2)
    assert heart.place.count == 8 and heart.name == ""
    assert 0.02 <= heart.take_working_seconds() < 0.2 and heart.take_working_seconds() < 0.02
    with pytest.raises(KeyError), heart.phase("x"):
        raise KeyError
    assert heart.name == ""


def test_a_paused_process_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading before it begins and a pause of the process do not count; what goes wrong in a turn ends no watch."""
    heart = Heartbeat()
    dog = Watchdog(tmp_path, 0, 1, "x", 5.0, 9.0, str, heart=heart)
    heart._place = replace(heart.place, begun=time.monotonic() - 100)
    note_folder(tmp_path)
    monkeypatch.setattr(dog._thread, "start", lambda: None)
    dog.begin()
    assert not dog._stands(heart.place)
    dog._looked -= 6.0
    assert dog._stands(heart.place)
    monkeypatch.setattr(dog, "_verdict", lambda: 1 / 0)
    turns = iter([False, False, True])
    monkeypatch.setattr(dog._ended, "wait", lambda _: next(turns))
    dog._watch()
    assert next(turns, None) is None
