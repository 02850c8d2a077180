"""The list of an export that its marker names must be there and be the one that was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mocte_ds.errors import CheckpointError
from mocte_ds.ownership import replace_folder
from mocte_ds.ownership.checksums import CHECKSUMS_FILE, Checksums, write_checksums
from mocte_ds.ownership.marker import MARKER


@pytest.fixture
def export(tmp_path: Path) -> Path:
    with replace_folder(tmp_path / "export", "export_hf") as pending:
        (pending / "config.json").write_text('{"rms_norm_eps": 1e-5}')
        write_checksums(pending, {})
    return tmp_path / "export"


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


LOST: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "a dangling link": dangling,
    "emptied": lambda path: path.write_text(json.dumps({"tensors": {}, "files": {}})),
    "a damaged marker": lambda path: (path.parent / MARKER).write_text("{}"),
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_list_is_refused(how: str, export: Path) -> None:
    sums = Checksums.read(export)
    assert sums is not None and set(sums.files) == {"config.json"}
    LOST[how](export / CHECKSUMS_FILE)
    with pytest.raises(CheckpointError, match=f"remove {CHECKSUMS_FILE} and {MARKER}"):
        Checksums.read(export)


def test_a_folder_that_was_changed_on_purpose(export: Path) -> None:
    for name in (CHECKSUMS_FILE, MARKER):
        (export / name).unlink()
    assert Checksums.read(export) is None
