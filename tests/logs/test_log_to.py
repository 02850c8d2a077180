"""engine.mocte.log_to in a script with a model of its own: what report and inspect_run read is what the engine says."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.logs.monitors import check_scalars, step_scalars
from mocte_ds.report import read_run, write_report
from mocte_ds.report.run_table import run_facts, run_text
from tests.logs import hand_made
from tests.spawn import spawn


@pytest.fixture(scope="module", params=["called", "named"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict]:
    """A run that was cut off and went on: its folder, and what each of its two starts has returned on rank 0."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "notes.txt").write_text("of the user")
    named = request.param == "named"
    first = spawn(hand_made.logged, 2, str(folder), str(folder / "csv"), named, "no", timeout=200)[0]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == hand_made.SAVED_AT + 3, "every step is on the disk before a run ends"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "tok')
    when = "after" if named else "before"
    second = spawn(hand_made.logged, 2, str(folder), str(folder / "more"), named, when, timeout=200)[0]
    return folder, first, second


def test_what_the_report_reads_is_what_the_engine_says(run: tuple[Path, dict, dict]) -> None:
    folder, first, second = run
    found, told = read_run(folder), [*first["steps"], *second["steps"]]
    assert [row["step"] for row in found.metrics] == list(range(1, hand_made.STEPS + 1))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == hand_made.STEPS, "no step twice"
    assert found.notes == []
    for row, own in zip(found.metrics, told, strict=True):
        assert row["loss"] == pytest.approx(own.pop("loss"), rel=1e-6)
        assert {name: row[name] for name in own} == own
        assert row["optimizer_bytes"] == sum(own["optimizer_bytes_by_rank"]) and row["seconds"] > 0
    events = [event for event in found.events if event["event"] not in ("save", "resume")]
    before = [event for event in first["events"] if event["step"] <= hand_made.SAVED_AT]
    assert json.loads(json.dumps(events)) == [*before, *second["events"]]
    kinds = [event["event"] for event in found.events]
    assert kinds.count("emergence") == 2 and kinds.count("freeze") == 1
    assert kinds.count("save") == 1 and kinds.count("resume") == 1, kinds
    assert second["experts"][0][1][0] == "frozen"
    assert (folder / "notes.txt").read_text() == "of the user" and "run.lock" in second["files"]


def test_report_and_inspect_run(run: tuple[Path, dict, dict], tmp_path: Path) -> None:
    folder, _, second = run
    result = write_report(folder, tmp_path, progress=False)
    assert result["steps"] == result["budget"] == hand_made.STEPS and result["frozen"] == [[0, 1]]
    assert result["emerged"] == [0, 1] and result["tokens"] == second["steps"][-1]["tokens"]
    page = (tmp_path / "index.html").read_text()
    assert "Experts have emerged in 2 of 2 blocks" in page and "1 of 4 experts is frozen" in page
    for remark in (
        "a script tells its own by engine.log_validation",
        "FLOPs of a script&#x27;s own model are not counted",
    ):
        assert remark in page, "what a script does not tell is said to be missing"
    assert "nothing has been validated yet" not in page and "launch/pretrain" not in page
    facts = run_facts(read_run(folder))
    last = facts["checks"][-1]["blocks"][0]["experts"]
    assert [(expert["mode"], expert["lambda"]) for expert in last] == [tuple(expert) for expert in second["experts"][0]]
    assert "step 20 of 20" in run_text(read_run(folder))


def test_secrets_are_nowhere(run: tuple[Path, dict, dict]) -> None:
    """DeepSpeed keeps its config in each file of a checkpoint."""
    paths = [path for path in run[0].rglob("*") if path.is_file()]
    assert any(b"csv_monitor" in path.read_bytes() for path in paths if path.suffix == ".pt")
    assert not [path for path in paths if hand_made.SECRET.encode() in path.read_bytes()]


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Rows of every file of DeepSpeed's CSV monitor that is ours."""
    found = {}
    for path in (folder / "run").glob("mocte_*.csv"):
        rows = list(csv.reader(path.read_text().splitlines()))
        found[path.stem.removeprefix("mocte_")] = [(int(row[0]), float(row[1])) for row in rows if row[0] != "step"]
    return found


def test_csv_monitor(run: tuple[Path, dict, dict]) -> None:
    """Every number in DeepSpeed's monitor is one of the logs, at the same tokens."""
    folder, _, _ = run
    found, expected = series(folder / "more"), {}
    log = read_run(folder)
    for row in log.metrics[hand_made.SAVED_AT :]:
        for name, value in step_scalars(row).items():
            if value is not None:
                expected.setdefault(name.replace("/", "_"), []).append((row["tokens"], value))
    for event in log.checks:
        if event["step"] > hand_made.SAVED_AT:
            for name, value in check_scalars(event).items():
                if value is not None:
                    expected.setdefault(name.replace("/", "_"), []).append((event["tokens"], value))
    assert found == expected
    wanted = ["loss", "frozen_experts", "optimizer_bytes", "silhouette_block0", "lambda_block1_expert0"]
    assert {*wanted, "load_block0_expert1", "load_max_mean_block1"} <= set(found)
    assert [value for _, value in found["frozen_experts"]] == [0, 0, *[1] * 8]


def test_a_line_is_one_exchange(tmp_path: Path) -> None:
    plain, logged = spawn(hand_made.exchanges, 2, str(tmp_path / "log"), timeout=200)[0]
    assert logged == [count + 1 for count in plain] and min(plain) > 0
    assert len((tmp_path / "log" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_monitor_alone(tmp_path: Path) -> None:
    """Without a folder the monitors have the numbers all the same; every one is the engine's."""
    told = spawn(hand_made.unlogged, 2, str(tmp_path), timeout=200)[0]
    found = series(tmp_path)
    tokens = [row["tokens"] for row in told]
    assert [x for x, _ in found["loss"]] == tokens
    assert [value for _, value in found["loss"]] == pytest.approx([row["loss"] for row in told], rel=1e-6)
    assert found["optimizer_bytes"] == [(row["tokens"], sum(row["optimizer_bytes_by_rank"])) for row in told]
    assert found["training_experts"][-1] == (tokens[-1], 4)
    loads = [row["expert_load"][1] for row in told if sum(row["expert_load"][1])]
    assert loads and [y for _, y in found["load_max_mean_block1"]] == [max(n) * 2 / sum(n) for n in loads]
