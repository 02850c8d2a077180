"""How often a run that failed starts again, and how the launcher and SLURM are told."""

import json
import time
from pathlib import Path

import pytest

from mocte_ds.errors import DataError
from mocte_ds.hosts.environment import main as print_environment
from mocte_ds.hosts.retries import Retries, last_checkpoint, main, run_folder, was_stopped
from mocte_ds.stop import EXIT_AGAIN
from mocte_ds.training.lost import LostRank, write_cause


def test_pauses_grow_and_end() -> None:
    retries = Retries(3)
    assert [retries.after(1, None) for _ in range(4)] == [15.0, 30.0, 60.0, None]
    assert max(Retries(99, count=n).after(137, None) or 0 for n in range(99)) == 600.0


def test_a_new_checkpoint_begins_the_count_again() -> None:
    retries = Retries(2)
    assert [retries.after(1, tag) for tag in ("a", "a", "b", "b", "b")] == [15.0, 30.0, 15.0, 30.0, None]


def test_success_and_errors_of_the_user_end_it() -> None:
    assert Retries(9).after(0, None) is None and Retries(9).after(2, None) is None
    assert Retries(9).after(EXIT_AGAIN, None) == 15.0 and Retries(0).after(1, None) is None


def make_run(folder: Path, *events: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step6\n", encoding="utf-8")
    lines = [json.dumps({"event": name, "step": 6}) for name in events]
    (folder / "events.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def asked(folder: Path, status: int, since: float = 0.0) -> list[str]:
    return ["--state", str(folder / "state"), "--status", str(status), "--since", str(since), "--restarts", "2", "--"]


def test_the_command_remembers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "out", "resume", "save")
    options = ["--run", "x.yaml", "--out", str(run)]
    told = []
    for status in (1, 137, 1, 0):
        assert main([*asked(tmp_path, status), *options]) == 0
        told.append(capsys.readouterr().out.strip())
    assert told == ["15", "30", "", ""]
    (run / "checkpoints" / "latest").write_text("step7", encoding="utf-8")
    main([*asked(tmp_path, 1), *options])
    assert capsys.readouterr().out.strip() == "15"


def test_a_run_that_a_signal_stopped_goes_on_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "out", "save", "stop")
    main([*asked(tmp_path, 0), "--run", "x.yaml", "--out", str(run)])
    assert capsys.readouterr().out.strip() == "0"
    assert not was_stopped(tmp_path / "nowhere") and last_checkpoint(tmp_path / "nowhere") is None


def test_the_first_cause_decides_whose_error_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SLURM ends with the largest code of all ranks, here that of a rank which was killed because of the first."""
    run, began = make_run(tmp_path / "out"), time.time() - 1
    options = ["--run", "x.yaml", "--out", str(run)]
    write_cause(run, 1, DataError("a file is gone"))
    main([*asked(tmp_path, 137, began), *options])
    assert capsys.readouterr().out == ""
    main([*asked(tmp_path, 137, time.time() + 60), *options])  # the word of an earlier start
    assert capsys.readouterr().out.strip() == "15"
    (run / "last_error.json").unlink()
    write_cause(run, 1, LostRank("killed"))
    main([*asked(tmp_path, 137, began), *options])
    assert capsys.readouterr().out.strip() == "30"


def test_every_spelling_of_the_run_file() -> None:
    for option in ("--run", "--run-file"):
        assert run_folder([option, "a/b.yaml"]) == run_folder([f"{option}=a/b.yaml"]) == Path("runs/b")


def test_variables_of_the_file_for_shells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nX=a b=c\n", encoding="utf-8")
    assert print_environment() == 0
    assert capsys.readouterr().out == "NCCL_DEBUG=INFO\0X=a b=c\0"
