"""Logs of a run: a line per step, and after a resume no step twice."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mocte_ds.errors import MocteError
from mocte_ds.training.telemetry import Telemetry


def metrics(step: int) -> dict:
    return {
        "step": step,
        "tokens": 10 * step,
        "loss": 5.0,
        "lr": 1e-3,
        "grad_norm": None,
        "tokens_per_second": 100.0,
        "validation": {"a": 4.0, "mean": 4.0} if step == 2 else None,
    }


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_resume_takes_back_later_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = Telemetry(tmp_path, True, 5, 0, None)
    for step in (1, 2, 3):
        log.step(metrics(step))
    log.event({"event": "freeze", "step": 3, "block": 0, "expert": 1, "reason": "enough"})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3], "lines must be on the disk before the run ends"
    log.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "tok')
    log = Telemetry(tmp_path, True, 5, 2, None)
    log.step(metrics(3))
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert steps(tmp_path / "events.jsonl") == []
    assert "step 3: freeze of block 0 expert 1 (enough)" in capsys.readouterr().err


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    log = Telemetry(tmp_path, False, 5, 0, None)
    log.step(metrics(1))
    log.event({"event": "save", "step": 1})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(tmp_path: Path) -> None:
    written: list[tuple] = []
    monitor = SimpleNamespace(enabled=True, write_events=written.extend)
    log = Telemetry(tmp_path, True, 5, 0, monitor)
    log.step({**metrics(2), "mfu": 0.25, "optimizer_bytes": 96, "expert_load": [[30, 10], [0, 0]]})
    block = {"block": 1, "silhouette": 0.5, "load": [7, 9], "experts": [{"expert": 0, "lambda": 0.25}]}
    log.event({"event": "check", "step": 2, "tokens": 20, "blocks": [block]})
    log.close()
    assert ("mocte/optimizer_bytes", 96, 20) in written and ("mocte/load_max_mean/block0", 1.5, 20) in written
    assert ("mocte/silhouette/block1", 0.5, 20) in written and ("mocte/load/block1/expert1", 9, 20) in written
    assert ("mocte/lambda/block1/expert0", 0.25, 20) in written
    assert ("mocte/mfu", 0.25, 20) in written
    assert ("mocte/loss", 5.0, 20) in written and ("mocte/validation/a", 4.0, 20) in written
    assert all(value is not None for _, value, _ in written)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MocteError, match="cannot write"):
        Telemetry(tmp_path, True, 5, 0, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first message is the last one: closing tries to write the same line again and must not hide it."""
    log = Telemetry(tmp_path, True, 5, 0, None)
    log._files._files["metrics"] = open("/dev/full", "w", buffering=1)
    with pytest.raises(MocteError, match="cannot write /dev/full: No space left.*the run resumes"):
        log.step(metrics(1))
    log.close()
    other = Telemetry(tmp_path, True, 5, 0, None)
    other._files._files["metrics"] = open("/dev/full", "w", buffering=-1)
    other._files._files["metrics"].write("x")  # in the buffer
    with pytest.raises(MocteError, match="cannot write /dev/full: No space left"):
        other.close()
    third = Telemetry(tmp_path, True, 5, 0, None)
    third._files._files["events"] = open("/dev/full", "w", buffering=-1)
    third._files._files["events"].write("x")
    third.close(after_error=True)


def test_tensorboard_on_a_full_disk(tmp_path: Path) -> None:
    def full(_: list) -> None:
        raise OSError(28, "No space left on device")

    log = Telemetry(tmp_path, True, 5, 0, SimpleNamespace(enabled=True, write_events=full))
    with pytest.raises(MocteError, match="cannot write the files of DeepSpeed's monitors: No space left"):
        log.step(metrics(1))
    log.close()
