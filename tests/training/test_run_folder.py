"""Where a resumed run goes on, and when it refuses to."""

import json
from pathlib import Path

import pytest

from mocte_ds.checkpoints.place import Place, remove_leftovers
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.manifest import Manifest
from mocte_ds.ownership.workshop import begin
from mocte_ds.training import run_folder
from mocte_ds.training.changes import IDENTITY_FILE, Changes, changes_so_far, require_same_run
from mocte_ds.training.run_config import identity_defaults
from mocte_ds.training.run_folder import checkpoint_step, prune_checkpoints, resume_folder


def make_checkpoints(folder: Path, *steps: int, latest: int) -> None:
    for step in steps:
        one = folder / f"step{step}"
        one.mkdir(parents=True)
        (one / "weights.pt").write_text("x", encoding="utf-8")
        Manifest("run", step, 1, {"weights.pt": hash_file(one / "weights.pt")}).write(one)
    (folder / "latest").write_text(f"step{latest}", encoding="utf-8")


def test_resume(tmp_path: Path) -> None:
    assert resume_folder(tmp_path, "auto") is None
    assert resume_folder(tmp_path, "no") is None
    with pytest.raises(ConfigError, match="no checkpoint there"):
        resume_folder(tmp_path, str(tmp_path / "other"))
    own = tmp_path / "checkpoints"
    make_checkpoints(own, 10, latest=10)
    assert resume_folder(tmp_path, "auto") == own
    assert resume_folder(tmp_path / "new", str(tmp_path)) == own
    assert resume_folder(tmp_path / "new", str(own)) == own
    with pytest.raises(ConfigError, match="already holds a run"):
        resume_folder(tmp_path, "no")


def test_latest_without_its_folder(tmp_path: Path) -> None:
    make_checkpoints(tmp_path / "checkpoints", 10, latest=20)
    with pytest.raises(CheckpointError, match="names the checkpoint 'step20', which is not there"):
        resume_folder(tmp_path, "auto")


@pytest.mark.parametrize("resume", ["auto", "no", "folder"])
@pytest.mark.parametrize("left", ["nothing", "a dangling link", "a folder"])
def test_a_lost_latest_does_not_start_anew(resume: str, left: str, tmp_path: Path) -> None:
    make_checkpoints(own := tmp_path / "checkpoints", 9, 10, latest=10)
    (own / "latest").unlink()
    if left == "a dangling link":
        (own / "latest").symlink_to("step12")
    elif left == "a folder":
        (own / "latest").mkdir()
    out, resume = (tmp_path / "new", str(tmp_path)) if resume == "folder" else (tmp_path, resume)
    with pytest.raises(CheckpointError, match="step9, step10: write step10 into it to go on from there"):
        resume_folder(out, resume)


def test_a_save_that_was_killed_before_latest_named_it_does_not_count(tmp_path: Path) -> None:
    make_checkpoints(own := tmp_path / "checkpoints", 10, latest=10)
    (own / "latest").unlink()
    (own / "step10").rename(partial := Place(own, "step10").partial)
    begin(partial)
    Place(own, "step10").swap_in()
    assert resume_folder(tmp_path, "auto") is None
    (place := Place(own, "step10")).prepare(0)  # the next save of this name may take its place
    place.give_up()
    make_checkpoints(own, 20, 30, latest=30)
    assert prune_checkpoints(own, keep=2) == [] and not (own / "step10").exists()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    identity = {"model.hidden_size": 128, "training.betas": [0.9, 0.95], "ranks": 2}
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        require_same_run(identity, tmp_path)
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(identity), encoding="utf-8")
    require_same_run({**identity, "training.betas": [0.9, 0.95]}, tmp_path)
    other = {**identity, "model.hidden_size": 256, "ranks": 4}
    with pytest.raises(CheckpointError, match=r"hidden_size: checkpoint 128, run 256; ranks: checkpoint 2, run 4"):
        require_same_run(other, tmp_path)


def test_what_an_older_version_did_not_say_is_as_usual(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"model.hidden_size": 128}), encoding="utf-8")
    usual = identity_defaults()
    assert usual["data.document_mask"] is False and "model.hidden_size" not in usual
    require_same_run({"model.hidden_size": 128, "data.document_mask": False}, tmp_path, usual)
    with pytest.raises(CheckpointError, match=r"another configuration: data.document_mask: checkpoint False, run True"):
        require_same_run({"model.hidden_size": 128, "data.document_mask": True}, tmp_path, usual)
    with pytest.raises(CheckpointError, match="hidden_size: checkpoint 128, run None"):
        require_same_run({}, tmp_path, usual)


def test_a_run_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    """Its presets were models of its own."""
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"model.style": "llama", "model.num_layers": 2}))
    with pytest.raises(CheckpointError, match="earlier version of mocte-ds, whose presets were models of its own"):
        require_same_run({"model.hf.model_type": "llama", "model.hf.num_hidden_layers": 2}, tmp_path)
    require_same_run({"model.style": "llama", "model.num_layers": 2}, tmp_path)  # of an imported start


def test_pruning_keeps_the_last_good_one(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, 100, 110, latest=20)  # 100 and 110 were cut off
    (tmp_path / "mine").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "mine", "step100", "step110", "step20"]
    (tmp_path / "latest").write_text("step110", encoding="utf-8")
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "mine", "step110"]


def test_pruning_leaves_saves_under_way(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, 30, latest=10)
    for name in (".step40.mocte-partial", ".step10.mocte-replaced"):
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, keep=1)
    left = [".step10.mocte-replaced", ".step40.mocte-partial", "latest", "step10", "step30"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    (tmp_path / "step10").rename(tmp_path / "elsewhere")  # killed while step10 was replaced
    prune_checkpoints(tmp_path, keep=1)
    assert (tmp_path / ".step10.mocte-replaced").is_dir() and (tmp_path / "step30").is_dir()


def test_pruning_removes_nothing_that_is_not_ours(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, 30, 40, 50, latest=50)
    (tmp_path / "step10" / "notes.txt").write_text("precious")
    (tmp_path / "step20" / ".hidden").write_text("precious")
    (tmp_path / "step5").mkdir()
    (tmp_path / "step5" / "notes.txt").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step7").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step99").mkdir()  # newer than all; must not count as one of those that stay
    for name in ("step\u00b2", "step\u0663", "step012"):
        (tmp_path / name).mkdir()
    told = prune_checkpoints(tmp_path, keep=2)
    left = {"step10", "step20", "step5", "step7", "step99", "step40", "step50", "step\u00b2", "step\u0663", "step012"}
    assert {path.name for path in tmp_path.iterdir()} == left | {"latest", "elsewhere"}
    text = " ".join(told)
    assert len(told) == 4 and "step10 stays: notes.txt in it is not of the checkpoint" in text
    assert "step20 stays: .hidden in it" in text and "step5 stays: it has no whole mocte_manifest.json" in text
    assert "step7 stays: it is not a folder" in text


def test_pruning_spares_a_checkpoint_whose_bytes_were_changed(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, 30, 40, latest=40)
    (tmp_path / "step10" / "weights.pt").write_text("y", encoding="utf-8")  # of the same size
    told = prune_checkpoints(tmp_path, 2, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step10", "step30", "step40"]
    assert len(told) == 1 and "step10 stays: weights.pt in it was changed since it was saved" in told[0]


def test_pruning_does_not_count_a_branch_that_was_left(tmp_path: Path) -> None:
    """`latest` was set back from 100 to 60: the new branch keeps two, and the old one's stay until it comes by."""
    make_checkpoints(tmp_path, 60, 80, 100, latest=60)
    left = []
    for step in (65, 70, 75, 80, 85):
        if step != 80:  # a save replaces it
            make_checkpoints(tmp_path, step, latest=step)
        (tmp_path / "latest").write_text(f"step{step}", encoding="utf-8")
        told = prune_checkpoints(tmp_path, 2, step)
        left.append(sorted(int(path.name[4:]) for path in tmp_path.glob("step*")))
        assert [t.split(" stays")[0][-4:] for t in told] == (["p100", "ep80"] if step < 80 else ["p100"])
        assert "of a later step than this run has come to" in told[0]
    assert left == [[60, 65, 80, 100], [65, 70, 80, 100], [70, 75, 80, 100], [75, 80, 100], [80, 85, 100]]


def test_a_pruning_that_is_killed_leaves_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoints(tmp_path, 10, 20, latest=20)
    monkeypatch.setattr(run_folder, "discard", lambda *_: None)
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step10.mocte-partial", "latest", "step20"]
    monkeypatch.undo()
    (tmp_path / ".link.mocte-partial").symlink_to(tmp_path / "step20")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".link.mocte-partial", "latest", "step20"]
    assert (tmp_path / "step20" / "weights.pt").is_file()


def test_more_steps_and_other_data(tmp_path: Path) -> None:
    before = {"training.steps": 20, "training.seed": 0, "data.manifest": "aa", "data.weights": None, "model.size": 3}
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(before), encoding="utf-8")
    assert require_same_run(before, tmp_path) == Changes()
    longer = {**before, "training.steps": 30}
    assert require_same_run(longer, tmp_path) == Changes(steps=(20, 30))
    for steps in (19, "30", 25.0, True):
        with pytest.raises(CheckpointError, match="training.steps: checkpoint 20, run"):
            require_same_run({**before, "training.steps": steps}, tmp_path)
    other = {**longer, "training.seed": 7, "data.manifest": "bb"}
    with pytest.raises(CheckpointError, match="seed: checkpoint 0, run 7; data.manifest: .*--allow-data-change lets"):
        require_same_run(other, tmp_path)
    changes = require_same_run(other, tmp_path, allow_data_change=True)
    assert changes.steps == (20, 30) and set(changes.data) == {"training.seed", "data.manifest"}
    assert changes.facts["training.seed"] == {"checkpoint": 0, "run": 7} and len(changes.facts) == 3
    with pytest.raises(CheckpointError, match=r"configuration: model.size: checkpoint 3, run 4\. "):
        require_same_run({**other, "model.size": 4}, tmp_path, allow_data_change=True)


def test_changes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert changes_so_far(path, 5) == []
    path.write_text(json.dumps({"changes": [{"step": 3, "a": 1}, {"step": 9, "a": 2}]}))
    for step in (5, 9):  # a second resume from step 9 detects its change again
        assert changes_so_far(path, step) == [{"step": 3, "a": 1}]
    for damaged in ("", "[]", '{"changes": [1]}', "[" * 100_000):
        path.write_text(damaged)
        assert changes_so_far(path, 5) == []


def test_names() -> None:
    assert checkpoint_step("step120") == 120 and checkpoint_step("step0") == 0
    strange = ("mine", "step", "step1x", "120", "step\u00b2", "step\u0663", "step012", "step" + 5000 * "9", "step1\n")
    assert [checkpoint_step(name) for name in strange] == [None] * len(strange)
