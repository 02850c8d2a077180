"""Where a resumed run goes on, and when it refuses to."""

import json
from pathlib import Path

import pytest

from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.training.run_config import identity_defaults
from mocte_ds.training.run_folder import (
    IDENTITY_FILE,
    checkpoint_step,
    prune_checkpoints,
    require_same_run,
    resume_folder,
)


def make_checkpoints(folder: Path, *steps: int, latest: int) -> None:
    for step in steps:
        (folder / f"step{step}").mkdir(parents=True)
        (folder / f"step{step}" / "weights.pt").write_text("x", encoding="utf-8")
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


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    identity = {"model.hidden_size": 128, "training.betas": [0.9, 0.95], "ranks": 2}
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        require_same_run(identity, tmp_path)
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(identity), encoding="utf-8")
    require_same_run({**identity, "training.betas": [0.9, 0.95]}, tmp_path)
    other = {**identity, "model.hidden_size": 256, "ranks": 4}
    with pytest.raises(CheckpointError, match=r"hidden_size: checkpoint 128, run 256; ranks: checkpoint 2, run 4"):
        require_same_run(other, tmp_path)


def test_what_an_older_version_did_not_say_is_as_usual(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"model.hidden_size": 128}), encoding="utf-8")
    usual = identity_defaults()
    assert usual["model.rotary_share"] == 1.0 and "model.hidden_size" not in usual
    require_same_run({"model.hidden_size": 128, "model.rotary_share": 1.0}, tmp_path, usual)
    with pytest.raises(CheckpointError, match=r"another configuration: model.rotary_share: checkpoint 1.0, run 0.5\."):
        require_same_run({"model.hidden_size": 128, "model.rotary_share": 0.5}, tmp_path, usual)
    with pytest.raises(CheckpointError, match="hidden_size: checkpoint 128, run None"):
        require_same_run({}, tmp_path, usual)


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


def test_names() -> None:
    assert checkpoint_step("step120") == 120
    assert [checkpoint_step(name) for name in ("mine", "step", "step1x", "120")] == [None] * 4
