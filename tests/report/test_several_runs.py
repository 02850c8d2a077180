"""Several runs by block: steps of emergence, clusters and conflict, against the logs as they were written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.errors import MocteError
from mocte_ds.report.reader import read_run
from mocte_ds.report.several_runs import several_facts, several_text
from tests.report.synthetic import write_run
from tools.inspect_run import main


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two seeds of an arm, and a dense run; conflict at every tenth check."""
    made = []
    for name, seed, changes in (
        ("type-seed0", 0, {}),
        ("type-seed1", 1, {}),
        ("dense-seed0", 2, {"emergences": False}),
    ):
        folder = tmp_path / name
        write_run(folder, seed=seed, **changes)
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        for event in events:
            if event["event"] == "check":
                for entry in event["blocks"]:
                    measured = event["step"] % 50 == 0 or event["step"] == 10
                    entry["conflict"] = {"Q": event["step"] / 1000 + entry["block"] + seed} if measured else None
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        made.append(folder)
    return made


def checks(folder: Path, block: int) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "check"]
    return [{"step": event["step"], **event["blocks"][block]} for event in found]


def test_facts_are_those_of_the_logs(folders: list[Path]) -> None:
    facts = several_facts([read_run(folder) for folder in folders])
    assert [(f["arm"], f["block"]) for f in facts] == [("type", 0), ("type", 1)] * 2 + [("dense", 0), ("dense", 1)]
    for fact in facts:
        log = checks(Path(fact["run"]), fact["block"])
        emergences = [
            event
            for event in map(json.loads, (Path(fact["run"]) / "events.jsonl").read_text().splitlines())
            if event["event"] == "emergence" and event["block"] == fact["block"]
        ]
        assert fact["emerged"] == (emergences[0]["step"] if emergences else None)
        assert fact["found"] == pytest.approx(sum(entry["found"] for entry in log) / len(log))
        assert fact["first_found"] == next((entry["step"] for entry in log if entry["found"]), None)
        late = [entry["nmi"] for entry in log if entry["step"] > 150]
        assert len(late) == 30 and fact["after"]["nmi"] == pytest.approx(sum(late) / 30)
        # Blocks 0 and 1 emerge at 30 and 45: the dense run is read before 30, too.
        early = [entry for entry in log if entry["step"] <= 30]
        assert fact["before"]["nmi"] == early[-1]["nmi"]
        seed = {"type-seed0": 0, "type-seed1": 1, "dense-seed0": 2}[Path(fact["run"]).name]
        assert fact["before"]["Q"] == pytest.approx(0.01 + fact["block"] + seed)
        assert fact["after"]["Q"] == pytest.approx(0.25 + fact["block"] + seed)  # at 200, 250 and 300
        assert fact["after"]["cosine"] is None


def test_the_tool_takes_seeds_of_an_arm_together(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, folders), "--block", "1"]) == 0
    emergence, clusters, conflict = capsys.readouterr().out.split("\n\n")
    lines = [re.split(r"\s{2,}", line.strip()) for line in emergence.splitlines()[2:]]
    assert [line[:3] for line in lines] == [["type", "1", "2"], ["dense", "1", "1"]]
    assert re.fullmatch(r"45 \(\w+\), 45 \(\w+\)", lines[0][3]) and lines[1][3] == "-"
    assert "cosine" not in conflict and "1.5 (1..2) -> 1.8 (1.2..2.2)" in conflict
    assert "nmi" in clusters.splitlines()[1]
    assert main([*map(str, folders), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == several_facts([read_run(folder) for folder in folders])
    with pytest.raises(MocteError, match="--check shows checks of one run"):
        main([*map(str, folders), "--check", "last"])
    with pytest.raises(MocteError, match=r"no block 7 in .*type-seed0"):
        main([*map(str, folders), "--block", "7"])


def test_dense_runs_alone_have_no_before(folders: list[Path]) -> None:
    facts = several_facts([read_run(folders[2])])
    assert all(value is None for fact in facts for value in fact["before"].values())
    assert "emergence" in several_text(facts)


def test_folders_of_one_name_are_different_arms(tmp_path: Path) -> None:
    made = [tmp_path / parent / name for parent in ("a", "b") for name in ("run-seed0", "run-seed1")]
    for number, folder in enumerate(made):
        write_run(folder, seed=number)
    facts = several_facts([read_run(folder) for folder in made])
    arms = [str(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [fact["arm"] for fact in facts if fact["block"] == 0] == [arms[0]] * 2 + [arms[1]] * 2


def test_checks_that_did_not_look_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path / "run", seed=0)
    path = tmp_path / "run" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    looked = []
    for event in events:
        if event["event"] == "check":
            looked.append(event["step"] % 20 == 0)
            event["blocks"][0]["clusters"] = 3 if looked[-1] else None
            event["blocks"][0]["found"] = looked[-1] and event["step"] > 100
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    steps = [event["step"] for event in events if event["event"] == "check" and event["step"] % 20 == 0]
    expected = sum(step > 100 for step in steps) / len(steps)
    assert several_facts([read_run(tmp_path / "run")])[0]["found"] == pytest.approx(expected) and 0 < expected < 1
    assert not all(looked)
