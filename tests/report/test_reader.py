"""What the report reads from a run folder, whole, growing, cut off or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.errors import MocteError
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from tests.report.synthetic import DOMAINS, TOKENS_A_STEP, write_run


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_validations_that_a_script_tells_by_events(tmp_path: Path) -> None:
    """Each belongs to its step; those of several calls stand together, and one that was taken back stands nowhere."""
    rows = [{"step": step, "tokens": 8 * step, "loss": 2.0} for step in (1, 2, 3)]
    events = [("validation", 2, {"a": 3.0}), ("validation", 2, {"b": 5.0}), ("validation", 3, {"a": 9.0})]
    told = [{"event": kind, "step": step, "tokens": 8 * step, "validation": losses} for kind, step, losses in events]
    told += [{"event": "resume", "step": 2, "tokens": 16}, {**told[0], "step": 3, "validation": {"a": 1.0}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    found = read_run(tmp_path)
    assert [row.get("validation") for row in found.metrics] == [
        None,
        {"a": 3.0, "b": 5.0, "mean": 4.0},
        {"a": 1.0, "mean": 1.0},
    ]
    assert found.domains == ["a", "b"] and len(found.validations) == 2


def test_a_whole_run_is_read_as_it_was_written(run: Run, logs: dict[str, Any]) -> None:
    assert run.metrics == logs["metrics"]
    assert run.events == logs["events"]
    assert run.ledger == logs["ledger"]
    assert run.facts == logs["facts"]
    assert run.evaluation == logs["evaluation"]
    assert run.notes == []
    assert run.blocks == {0: "block 0 (layer 2)", 1: "block 1 (layer 3)"}
    assert run.experts == {0: 3, 1: 3}
    assert run.domains == DOMAINS
    assert run.tokens == 120 * TOKENS_A_STEP
    assert run.tokens_per_step == TOKENS_A_STEP


def test_lines_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    logs = write_run(tmp_path, steps=8, budget=60)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:40] + b"\n"
    lines[4] = b"\xff\xfe\x00 not text\n"
    lines[5] = b"[1, 2]\n"
    lines[7] = lines[7][:-30]
    log.write_bytes(b"".join(lines))
    run = read_run(tmp_path)
    assert [row["step"] for row in run.metrics] == [1, 2, 4, 7]
    assert run.metrics == [logs["metrics"][i] for i in (0, 1, 3, 6)]
    assert run.notes == ["metrics.jsonl: 4 line(s) could not be read and are left out (line 3, 5, 6, 8)."]
    assert run.tokens_per_step == TOKENS_A_STEP


def test_nan_and_infinity_are_none(tmp_path: Path) -> None:
    write_run(tmp_path, steps=4, budget=60)
    log = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[1]["loss"], rows[2]["loss"] = float("nan"), float("inf")
    write_lines(log, rows)
    log.write_text(log.read_text().replace(str(rows[3]["loss"]), "1e999"))
    assert [row["loss"] for row in read_run(tmp_path).metrics] == [rows[0]["loss"], None, None, None]


def test_what_a_resume_took_back_is_left_out(tmp_path: Path) -> None:
    logs = write_run(tmp_path, steps=60, budget=60)
    again = [{**row, "loss": 1.0} for row in logs["metrics"][40:50]]
    write_lines(tmp_path / "metrics.jsonl", logs["metrics"] + again)
    resume = {"event": "resume", "step": 40, "tokens": 40 * TOKENS_A_STEP, "checkpoint": "step40"}
    write_lines(tmp_path / "events.jsonl", [*logs["events"], resume])
    run = read_run(tmp_path)
    assert [row["step"] for row in run.metrics] == list(range(1, 51))
    assert [row["loss"] for row in run.metrics[40:]] == [1.0] * 10
    assert run.events == [event for event in logs["events"] if event["step"] <= 40] + [resume]
    gone = sum(event["step"] > 40 for event in logs["events"])
    assert any("20 step(s) were repeated" in note for note in run.notes)
    assert any(note.startswith(f"events.jsonl: {gone} event(s) after the checkpoint") for note in run.notes)


def test_events_stand_where_the_log_of_steps_has_their_step(tmp_path: Path) -> None:
    logs = write_run(tmp_path, steps=20, budget=60)
    events = [
        {"event": "check", "step": 5, "tokens": 7 * TOKENS_A_STEP, "blocks": []},
        {"event": "stop", "step": 10},
        {"event": "stop", "step": 12, "tokens": 12 * TOKENS_A_STEP},
        {"event": "freeze", "step": 99, "tokens": 99 * TOKENS_A_STEP},
    ]
    write_lines(tmp_path / "events.jsonl", events)
    write_lines(tmp_path / "metrics.jsonl", logs["metrics"][:11] + logs["metrics"][12:])
    run = read_run(tmp_path)
    assert [event["tokens"] // TOKENS_A_STEP for event in run.events] == [5, 10, 12, 20]
    assert [note for note in run.notes if "1 event(s) count other tokens" in note]


def test_missing_and_damaged_side_files_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, steps=5, budget=60)
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "ledger.json").write_text("[]")
    (tmp_path / "evaluation" / "results.json").unlink()
    run = read_run(tmp_path)
    assert run.events == [] and run.facts == {} and run.ledger == {} and run.evaluation == {}
    assert run.notes == [
        "events.jsonl is missing.",
        "ledger.json could not be read and is left out.",
        "run.json could not be read and is left out.",
    ]


def test_events_that_are_none_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, steps=5, budget=60)
    entries = [None, 3, {"name": "x"}, {"block": None}, {"block": 1, "name": "layers.9.mlp"}]
    good = {"event": "check", "step": 2, "tokens": 2 * TOKENS_A_STEP, "blocks": entries}
    write_lines(tmp_path / "events.jsonl", [{"step": 1}, {"event": "check"}, {"event": 3, "step": 1}, good])
    run = read_run(tmp_path)
    assert run.events == [good]
    assert run.block_history(1) == [(2 * TOKENS_A_STEP, entries[-1])]
    assert run.blocks[1] == "block 1 (layer 9)"


def test_one_step_is_enough(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1, budget=60)
    run = read_run(tmp_path)
    assert (run.tokens, run.tokens_per_step) == (TOKENS_A_STEP, TOKENS_A_STEP)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics.jsonl"),
        ("", "no readable step"),
        ('{"step": 1, "tok', "no readable step"),
        ('{"step": true, "tokens": 1}\n', "no readable step"),
    ],
)
def test_a_folder_without_a_step_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(MocteError, match=message):
        read_run(tmp_path)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MocteError, match="is not a folder"):
        read_run(tmp_path / "nothing")
