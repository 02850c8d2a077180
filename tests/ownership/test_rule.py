"""One rule: nothing is replaced or removed but what a marker shows to be ours and unchanged; a kill blocks nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mocte_ds.checkpoints.fp32 import convert_zero_checkpoint_to_fp32_state_dict
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.errors import CheckpointError, NotOurs
from mocte_ds.ownership import (
    append,
    note_coming,
    note_growing,
    put,
    remove,
    replace_folder,
    require_apart,
    require_new_or_ours,
)
from mocte_ds.ownership.__main__ import main
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.ownership.marker import MARKER, Entry, Marker
from mocte_ds.ownership.remove import remove_listed
from mocte_ds.ownership.workshop import workshop
from tests.ownership.trees import tree
from tests.training.test_run_folder import make_checkpoints

TOOL = "some_tool"
RECORD = b"\x05\0\0\0\0\0\0\0" + b"crc!" + b"event" + b"crc!"


def make_run(folder: Path) -> Path:
    """What several tools leave in one folder."""
    put(folder, {"tokenizer.model": b"pieces"}, "train_tokenizer")
    put(folder / "data", {"tokenizer/a.json": b"{}", "a.bin": b"ids", "manifest.json": b"{}"}, "prepare_data")
    put(folder, {"metrics.jsonl": b""}, "pretrain", grows=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events.out.tfevents.1.host.2.0").write_bytes(RECORD)
    note_growing(folder, ["tensorboard/events.out.tfevents.1.host.2.0"], "pretrain")
    with open(folder / "tensorboard" / "events.out.tfevents.1.host.2.0", "ab") as file:
        file.write(2 * RECORD + RECORD[:9])
    with replace_folder(folder / "export", "export_hf") as pending:
        (pending / "weights").write_bytes(b"1 2 3")
    return folder


def edit(name: str, content: bytes = b"of the user") -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def link(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        other = folder.with_name("other")
        (folder / name).rename(other)
        (folder / name).symlink_to(other)

    return change


def grow(name: str, content: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.write(content)

    return change


MINE = {
    "a file": edit("notes.txt"),
    "a hidden file": edit(".git/config"),
    "a file in a folder of ours": edit("data/mine.jsonl"),
    "a file in a new folder": edit("data/tokenizer/more/mine.txt"),
    "a changed file": edit("tokenizer.model", b"Pieces"),
    "a changed file of a whole folder": edit("export/weights", b"3 2 1"),
    "a line among ours": grow("metrics.jsonl", b'ss": 1}\nremember: lower rate\n'),
    "a line at the end without its end": lambda folder: (folder / "metrics.jsonl").write_text(
        '{"step": 1}\nremember: lower rate'
    ),
    "a changed line": edit("data/manifest.json", b"{} "),
    "text after records": grow("tensorboard/events.out.tfevents.1.host.2.0", b"what I saw in these curves: nothing"),
    "a link": link("tokenizer.model"),
    "a linked folder": link("data"),
    "a marker by hand": edit(f"data/{MARKER}", b"{}"),
    "a longer marker": edit(MARKER, b'{"format": 1, "files": {}, "whole": false, "checksum": "0"}'),
    "no marker": lambda folder: (folder / MARKER).unlink(),
}


@pytest.mark.parametrize("name", MINE)
def test_a_folder_with_anything_of_the_user_is_not_removed(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    MINE[name](folder)
    before = tree(tmp_path)
    with pytest.raises(NotOurs, match="Nothing was"):
        remove(folder)
    assert tree(tmp_path) == before


def test_what_is_ours_is_removed_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside").write_text("x")
    main([str(make_run(tmp_path / "run"))])
    main([str(tmp_path / "run")])  # is not there any more
    assert tree(tmp_path) == {"beside": tree(tmp_path)["beside"]}
    (tmp_path / "empty").mkdir()
    main([str(tmp_path / "empty")])
    assert not (tmp_path / "empty").exists()
    (tmp_path / "runs").mkdir()
    run = make_run(tmp_path / "runs" / "one")
    for folder in (tmp_path / "runs", tmp_path / "beside"):  # all is ours, but it is not one run
        with pytest.raises(NotOurs):
            remove(folder)
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(NotOurs, match="is a link"):
        remove(tmp_path / "link")
    assert (run / "tokenizer.model").is_file()


def test_others_stay_where_what_is_ours_goes(tmp_path: Path) -> None:
    put(tmp_path, {"op.so": b"1", "op.o": b"2"}, TOOL)
    edit("op.o")(tmp_path)
    edit("notes")(tmp_path)
    main([str(tmp_path), "--keep-others"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "notes", "op.o"]


@pytest.mark.parametrize("place", ["/", "~", "."])
def test_places_full_of_others_are_refused_at_once(place: str) -> None:
    folder = Path(place).expanduser()
    with pytest.raises(NotOurs):
        remove(folder)
    with pytest.raises(NotOurs):
        require_new_or_ours(folder, TOOL)


def test_files_are_replaced_only_where_they_are_ours(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"1", "b/c": b"2"}, TOOL)
    put(tmp_path, {"a": b"3", "b/c": b"4"}, TOOL)
    edit("b/c")(tmp_path)
    edit("d")(tmp_path)
    before = tree(tmp_path)
    for name in ("b/c", "d"):
        with pytest.raises(NotOurs, match=f"{name} was"):
            put(tmp_path, {"a": b"5", name: b"6"}, TOOL)
        with pytest.raises(NotOurs, match=f"{name} was"):
            put(tmp_path, {"a": b"5"}, TOOL, drop=[name])
    with pytest.raises(NotOurs, match="was written by some_tool"):
        put(tmp_path, {"a": b"5"}, "another_tool")
    with pytest.raises(NotOurs, match="d was not written"):
        append(tmp_path / "d", "more", TOOL)
    assert tree(tmp_path) == before
    put(tmp_path, {"d": b"of the user"}, TOOL)  # nothing to do, and it stays the user's
    with pytest.raises(NotOurs):
        put(tmp_path, {"d": b"7"}, TOOL)


def test_a_file_in_the_way_can_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for content in (b"first", b"second"):
        (tmp_path / "log").write_bytes(content)
        put(tmp_path, {"log": b"ours"}, TOOL, keep_others=True)
    kept = {name: (tmp_path / name).read_bytes() for name in ("log", "log.kept", "log.kept-2")}
    assert kept == {"log": b"ours", "log.kept": b"first", "log.kept-2": b"second"}
    assert "it is kept as log.kept-2" in capsys.readouterr().err


def test_the_whole_output_of_a_tool_takes_no_other_files(tmp_path: Path) -> None:
    out = tmp_path / "export"
    with replace_folder(out, TOOL) as pending:
        (pending / "weights").write_bytes(b"1")
    before = tree(tmp_path)
    with pytest.raises(NotOurs, match="would spoil"):
        put(out, {"results.json": b"{}"}, "evaluate")
    with pytest.raises(NotOurs, match="was written by some_tool"):
        require_new_or_ours(out, "another_tool")
    assert tree(tmp_path) == before
    with replace_folder(require_new_or_ours(out, TOOL), TOOL) as pending:
        (pending / "others").write_bytes(b"2")
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "others"]


def test_a_file_called_latest_is_ours_beside_the_checkpoint_that_it_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit("paper/latest", b"v2-final")(run)
    with pytest.raises(NotOurs, match="latest was not written"):
        remove(run)
    (run / "paper" / "latest").unlink()
    (run / "paper").rmdir()
    make_checkpoints(run / "checkpoints", 20, latest=20)
    edit("checkpoints/latest", b"v2-final")(run)
    with pytest.raises(NotOurs, match="latest was not written"):
        remove(run)
    edit("checkpoints/latest", b"step20\n")(run)
    remove(run)
    assert not run.exists()


def test_a_marker_that_names_files_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "victim.txt").write_bytes(b"")
    (tmp_path / "run").mkdir()
    for name in ("../victim.txt", str(tmp_path / "victim.txt"), "a/../../victim.txt"):
        entry = Entry("pretrain", (FileFacts(0, hashlib.sha256().hexdigest()),), True)
        (tmp_path / "run" / MARKER).write_text(Marker({name: entry}).text())
        assert remove_listed(tmp_path / "run") == []
        with pytest.raises(NotOurs):
            remove(tmp_path / "run")
    assert (tmp_path / "victim.txt").exists()


def test_nor_do_folders_in_it(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "export", TOOL) as pending:
        (pending / "sub").mkdir()
        (pending / "sub" / "weights").write_bytes(b"1")
    for name in ("run", "another"):
        make_checkpoints(tmp_path / name, 20, latest=20)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "step20")
    before = tree(tmp_path)
    for inside in ("export/sub", "export/new/deep", "run/step20/report", "link/report"):
        for write in (
            lambda out: put(out, {"index.html": b""}, "report"),
            lambda out: append(out / "log", "x", "report"),
            lambda out: require_new_or_ours(out / "other", "export_hf"),
            lambda out: convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "none", out),
            lambda out: reshape(tmp_path / "another" / "step20", out, 1, 1),
        ):
            with pytest.raises(NotOurs, match="would spoil"):
                write(tmp_path / inside)
    assert tree(tmp_path) == before
    (tmp_path / "pytorch_model.bin").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is there already"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "run", tmp_path)


def test_what_comes_in_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "export"
    with replace_folder(out, TOOL) as pending:
        (pending / "weights").write_bytes(b"1")
    with pytest.raises(NotOurs, match="meanwhile.*notes was not"), replace_folder(out, TOOL) as pending:
        (pending / "weights").write_bytes(b"2")
        edit("notes")(out)
    assert (out / "weights").read_bytes() == b"1" and (out / "notes").read_bytes() == b"of the user"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.link(tmp_path / "file", tmp_path / "same")
    a = tmp_path / "a"
    for out, source in (
        (a, a),
        (a / "b" / "new", a),
        (a, a / "b"),
        (tmp_path / "link", a),
        (tmp_path / "link" / "new", a),
        (a / ".." / "a", a),
        (tmp_path / "same", tmp_path / "file"),
    ):
        with pytest.raises(NotOurs, match="overlap"):
            require_apart(out, source)
    require_apart(a, a / "b", inside=True)
    require_apart(tmp_path / "ab", a)
    with pytest.raises(NotOurs):
        require_apart(a / "b", a, inside=True)


def test_work_under_way_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"1"}, TOOL)
    with workshop(tmp_path) as work:
        (work / "half").write_text("x")
        with workshop(tmp_path):
            assert (work / "half").exists()
        with pytest.raises(NotOurs, match="is in use"):
            remove(tmp_path)
    edit(".mocte-work-mine/notes")(tmp_path)  # by its name alone it is not ours
    with workshop(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, ".mocte-work-mine", "a"]


def test_work_that_ends_while_another_process_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a run end theirs in one folder at about the same time."""
    read = Marker.read

    def read_and_lose(folder: Path) -> Marker | None:
        found = read(folder)
        if folder.name.startswith(".mocte-work-other"):
            shutil.rmtree(folder)
        return found

    other = tmp_path / ".mocte-work-other"
    other.mkdir()
    (other / MARKER).write_text(Marker(work=other.name).text())
    monkeypatch.setattr(Marker, "read", read_and_lose)
    with workshop(tmp_path):
        pass
    assert not other.exists()


def test_files_whose_names_come_later(tmp_path: Path) -> None:
    """TensorBoard's files of one process are ours from their first byte on; those of others are not."""
    note_coming(tmp_path, "tensorboard/*.tfevents.*.host.7.*", "pretrain")
    (tmp_path / "tensorboard" / "job").mkdir(parents=True)
    (tmp_path / "tensorboard" / "job" / "events.out.tfevents.1.host.7.0").write_bytes(RECORD)
    for name, content in (
        ("events.out.tfevents.1.host.8.0", RECORD),
        ("events.out.tfevents.1.host.7.1", 40 * b"notes"),
    ):
        (tmp_path / "tensorboard" / "job" / name).write_bytes(content)
        with pytest.raises(NotOurs, match=name):
            remove(tmp_path)
        (tmp_path / "tensorboard" / "job" / name).unlink()
    remove(tmp_path)
    assert not tmp_path.exists()


def test_the_marker_says_what_it_is_for(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"1"}, TOOL)
    values = json.loads((tmp_path / MARKER).read_text())
    assert "removes and replaces nothing else" in values["note"]
    assert values["files"]["a"]["by"] == TOOL and values["files"]["a"]["versions"][0][0] == 1
