"""What log_to refuses, on all ranks and with what to do; logs of an earlier run and of others stay."""

import json
from pathlib import Path

import pytest

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.logs.files import LogFiles, keep_until
from mocte_ds.ownership.run_lock import run_lock
from tests.logs import hand_made
from tests.spawn import spawn


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "metrics.jsonl").write_text("of the user")
    (tmp_path / "file").write_text("")
    with run_lock(tmp_path / "busy"):
        found = spawn(hand_made.refused, 2, str(tmp_path), timeout=200)
    told = {
        "theirs": "theirs/metrics.jsonl was not written by mocte-ds",
        "file": "is a file, and a folder is needed",
        "busy": "another process runs in",
        "apart": "the ranks disagree on the folder of engine.mocte.log_to",
        "works": "no error",
        "twice": "the run logs into",
        "late": "was called after 1 steps, which would be missing: call it before the first step",
        "other checkpoint": "none/step1",
    }
    for rank, messages in enumerate(found):
        for name, text in told.items():
            assert text in messages[name], (rank, name, messages[name])
    assert "cannot write /dev/full: No space left" in found[0]["full"] and "the run resumes" in found[0]["full"]
    assert (tmp_path / "theirs" / "metrics.jsonl").read_text() == "of the user"
    assert not (tmp_path / "late").exists() and not (tmp_path / "rank0").exists()
    assert numbers(tmp_path / "mine" / "metrics.jsonl.kept") == [1], "the first run's log"
    assert numbers(tmp_path / "mine" / "metrics.jsonl") == [1, 2]


def test_the_key_of_the_block() -> None:
    assert MocteConfig.from_dict({"modules": "m", "log": "runs/x"}).log == "runs/x"
    for value, told in (("", 'log = "" must name a folder'), (3, "mocte.log = 3 must be of type str or null")):
        with pytest.raises(ConfigError, match=told):
            MocteConfig.from_dict({"modules": "m", "log": value})


def test_keep_until_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"no": 1}\n{"step": 2}\n{"step": 3}\n')
    keep_until(path, 2, "a test")
    assert numbers(path) == [1, 2]
    keep_until(tmp_path / "none.jsonl", 2, "a test")


def test_logs_of_another_tool_are_kept(tmp_path: Path) -> None:
    """One that pretrain has written is not cut by a script's log."""
    LogFiles(tmp_path, 0, "pretrain").write("metrics", {"step": 3})
    LogFiles(tmp_path, 1, "log_to").close()
    assert numbers(tmp_path / "metrics.jsonl.kept") == [3] and numbers(tmp_path / "metrics.jsonl") == []
