"""When another rank ends: its echo is told apart from errors, and the first cause is what everybody says."""

from pathlib import Path

import pytest

from mocte_ds.errors import DataError
from mocte_ds.training import lost


def chained(first: BaseException, second: BaseException) -> BaseException:
    try:
        try:
            raise first
        except BaseException:
            raise second  # noqa: B904  as a finally block would
    except BaseException as error:
        return error


def test_echoes() -> None:
    gloo = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:53821")
    assert lost.peer_is_lost(gloo)
    assert lost.peer_is_lost(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert lost.peer_is_lost(chained(gloo, OSError("no space left")))
    assert not lost.peer_is_lost(RuntimeError("size mismatch for weight"))
    assert not lost.peer_is_lost(BrokenPipeError("Broken pipe")), "a reader of our output, not a rank"


def test_the_first_cause_is_said_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost.write_cause(tmp_path, 1, DataError("the file x is gone;\nlook there."))
    lost.write_cause(tmp_path, 0, ValueError("later"))
    text = str(lost.lost_rank(tmp_path))
    assert text == "another rank ended; the first cause, on rank 1: the file x is gone; look there."
    lost.forget_cause(tmp_path)
    monkeypatch.setattr(lost, "_PATIENCE", 0.1)
    assert "without leaving word" in str(lost.lost_rank(tmp_path))
    lost.write_cause(tmp_path / "nowhere", 0, ValueError("x"))
    assert not (tmp_path / lost.CAUSE_FILE).exists() and not (tmp_path / "nowhere").exists()
    lost.write_cause(tmp_path, 0, KeyError("x"))
    assert "on rank 0: KeyError: 'x'" in str(lost.lost_rank(tmp_path))


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / lost.CAUSE_FILE).write_text("mine", encoding="utf-8")
    lost.write_cause(tmp_path, 0, ValueError("x"))
    lost.forget_cause(tmp_path)
    assert (tmp_path / lost.CAUSE_FILE).read_text(encoding="utf-8") == "mine"
