"""When another rank ends: its echo is told apart from errors, and the first cause is what everybody says."""

import os
from pathlib import Path

import pytest

from launch import pretrain
from mocte_ds.errors import DataError, MocteError
from mocte_ds.ownership import put, replace_folder
from mocte_ds.training import lost
from tests.ownership.trees import tree
from tests.training.test_run_folder import make_checkpoints


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


def test_a_cause_of_an_earlier_start_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "_PATIENCE", 0.1)
    lost.write_cause(tmp_path, 1, ValueError("of yesterday"))
    os.utime(tmp_path / lost.CAUSE_FILE, (1e9, 1e9))
    assert "without leaving word" in str(lost.lost_rank(tmp_path))
    lost.write_cause(tmp_path, 2, ValueError("of today"))
    assert "on rank 2: ValueError: of today" in str(lost.lost_rank(tmp_path))


def test_what_a_block_raises_is_told_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "_TURN", 0.1)
    with pytest.raises(DataError, match="is gone"), lost.word_of_errors(tmp_path, 1):
        raise DataError("the file x is gone")
    with pytest.raises(lost.LostRank, match="on rank 1: the file x is gone"), lost.word_of_errors(tmp_path, 0):
        raise RuntimeError("Connection closed by peer")


def of_the_user(folder: Path) -> Path:
    folder.mkdir()
    (folder / "chapter.tex").write_text("1")
    return folder


def whole_output(folder: Path) -> Path:
    with replace_folder(folder, "export_hf") as pending:
        (pending / "weights").write_bytes(b"1")
    return folder


def one_checkpoint(folder: Path) -> Path:
    make_checkpoints(folder, 20, latest=20)
    return folder / "step20"


@pytest.mark.parametrize("make", [of_the_user, whole_output, one_checkpoint])
def test_a_refused_start_writes_nothing(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out")
    put(tmp_path / "data", {"manifest.json": b"damaged"}, "prepare_data")
    run = tmp_path / "run.yaml"
    run.write_text(Path("launch/runs/quickstart.yaml").read_text())
    before = tree(tmp_path)
    for arguments in (
        ["--run", str(tmp_path / "none.yaml")],
        ["--run", str(run), "--set", "training.steps=none"],
        ["--run", str(run), "--set", f"data.prepared={tmp_path / 'data'}"],
    ):
        with pytest.raises(MocteError):
            pretrain.main([*arguments, "--out", str(out)])
        assert tree(tmp_path) == before
    lost.write_cause(out, 0, ValueError("x"))
    assert tree(tmp_path) == before or make is of_the_user, "the whole output of a tool takes no other files"
