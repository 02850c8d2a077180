"""What is read from a run's folder, and the table, against numbers worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.errors import MocteError
from mocte_ds.sweep import Arm, RunResult, Sweep, markdown_table, read_result
from tests.report.synthetic import write_dense_run, write_run

STEPS = 300


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_finished_run_has_the_logs_numbers(tmp_path: Path) -> None:
    logs = write_run(tmp_path, blocks=2, experts=4, steps=STEPS, budget=STEPS)
    for event in logs["events"]:
        if event["event"] == "check":
            # Two banks in one block, one in the other; only the last check counts.
            last = event["step"] == STEPS
            event["blocks"][0].update(churn=[0.1, 0.3] if last else [0.9, 0.9], imbalance=[1.0, 2.0])
            event["blocks"][1].update(churn=[0.2] if last else None, imbalance=[1.5])
    write_lines(tmp_path / "events.jsonl", logs["events"])
    found = read_result(tmp_path, "mine", 7)
    assert found is not None
    assert (found.arm, found.seed, found.steps, found.tokens) == ("mine", 7, STEPS, STEPS * 8192)
    # The story's four domains: 2.6, 2.9, 3.2, 3.5 and what is left of 5.2 nats in all of them.
    assert found.loss == pytest.approx(3.05 + 5.2 * math.exp(-6))
    spent = {
        name: value for name, value in logs["ledger"].items() if name not in ("total", "wgrad_saved", "validation")
    }
    assert found.flops == pytest.approx(2.1e12 * STEPS) and found.flops == pytest.approx(sum(spent.values()))
    own = sum(spent[name] for name in ("routing", "sampling", "spectrum", "clusters", "trainability"))
    assert found.own_flops == pytest.approx(own)
    assert found.wgrad_saved == pytest.approx(0.012 * 2.1e12 * STEPS)
    sizes = [sum(row["optimizer_bytes_by_rank"]) for row in logs["metrics"]]
    assert found.optimizer_bytes == sizes[-1] != sizes[0]
    assert found.mean_optimizer_bytes == pytest.approx(sum(sizes) / STEPS)
    # Block 0 emerges by detection, block 1 at the deadline; three experts freeze, and one of them thaws.
    assert (found.emerged, found.detected, found.freezes, found.frozen) == (2, 1, 3, 2)
    assert found.churn == pytest.approx((0.1 + 0.3 + 0.2) / 3) and found.imbalance == pytest.approx(1.5)
    assert found.seconds == pytest.approx(STEPS * 0.75) and found.check_seconds == pytest.approx(60 * 0.16)
    assert json.loads(json.dumps(found.to_dict()))["churn"] == found.churn


def test_without_a_probe_set_the_load_is_the_last_steps(tmp_path: Path) -> None:
    logs = write_run(tmp_path, blocks=2, experts=4)
    logs["facts"]["deepspeed"]["mocte"]["banks"] = [{"kind": "hash"}, {"kind": "type"}]
    logs["metrics"][-1]["expert_load"] = [[30, 10, 20, 20], [0, 0, 0, 0]]
    write_lines(tmp_path / "metrics.jsonl", logs["metrics"])
    (tmp_path / "run.json").write_text(json.dumps(logs["facts"]), encoding="utf-8")
    found = read_result(tmp_path, "mine", 0)
    # Banks of two experts: 30 of 40 where 20 would be even, and 20 of 40; the other block routes nothing yet.
    assert found is not None and found.imbalance == pytest.approx((1.5 + 1.0) / 2) and found.churn is None


def test_a_dense_run(tmp_path: Path) -> None:
    write_dense_run(tmp_path)
    found = read_result(tmp_path, "dense", 0)
    assert found is not None
    assert (found.own_flops, found.emerged, found.detected, found.frozen) == (0, 0, 0, 0)
    assert found.churn is None and found.imbalance is None and found.check_seconds == 0


def damaged(folder: Path, what: str) -> None:
    """A finished run, but for one thing."""
    logs = write_run(folder, steps=STEPS - 1 if what == "not at the end" else STEPS, budget=STEPS)
    if what == "the last checkpoint is missing":
        write_lines(
            folder / "events.jsonl", [row for row in logs["events"] if row["event"] != "save" or row["step"] < 300]
        )
    if what in ("ledger.json", "metrics.jsonl", "run.json"):
        (folder / what).unlink()
    if what == "run.json says nothing":
        (folder / "run.json").write_text("{}", encoding="utf-8")
    if what == "no validation at the end":
        del logs["metrics"][-1]["validation"]
    if what == "the loss is NaN":
        logs["metrics"][-1]["validation"]["mean"] = float("nan")
    write_lines(folder / "metrics.jsonl", logs["metrics"]) if what != "metrics.jsonl" else None
    if what == "the ledger is damaged":
        (folder / "ledger.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    "what",
    [
        "not at the end",
        "the last checkpoint is missing",
        "ledger.json",
        "metrics.jsonl",
        "run.json",
        "run.json says nothing",
    ],
)
def test_what_is_not_done_is_none(tmp_path: Path, what: str) -> None:
    damaged(tmp_path, what)
    assert read_result(tmp_path, "mine", 0) is None
    assert read_result(tmp_path / "nowhere", "mine", 0) is None


@pytest.mark.parametrize(
    ("what", "missing"),
    [
        ("no validation at the end", "finite validation loss"),
        ("the loss is NaN", "finite validation loss"),
        ("the ledger is damaged", "FLOPs"),
    ],
)
def test_what_is_done_but_has_no_numbers_is_refused(tmp_path: Path, what: str, missing: str) -> None:
    damaged(tmp_path, what)
    with pytest.raises(MocteError, match=f"has reached its last step, but its logs have no {missing} of it"):
        read_result(tmp_path, "mine", 0)


# The baseline with three seeds, an arm that saves, one that costs more, and one whose seed the baseline lacks.
PLAIN = RunResult(
    arm="dense",
    seed=0,
    steps=100,
    tokens=1000,
    loss=2.0,
    flops=1000.0,
    own_flops=0.0,
    wgrad_saved=0.0,
    optimizer_bytes=10_000_000,
    mean_optimizer_bytes=8e6,
    emerged=0,
    detected=0,
    frozen=0,
    freezes=0,
    churn=None,
    imbalance=None,
    seconds=1.0,
    check_seconds=0.0,
)
BLOCKS = replace(PLAIN, arm="thrifty", own_flops=9.0, emerged=4, detected=3, imbalance=1.2, churn=0.1)
RESULTS = [
    PLAIN,
    replace(PLAIN, seed=1, loss=2.2, flops=2000.0, optimizer_bytes=14_000_000, mean_optimizer_bytes=10e6),
    replace(PLAIN, seed=2, loss=2.7),
    # 10 % and 5 % fewer FLOPs than the baseline of the same seed, 25 % and 40 % fewer bytes.
    replace(
        BLOCKS, loss=2.1, flops=900.0, wgrad_saved=100.0, frozen=1, optimizer_bytes=9_000_000, mean_optimizer_bytes=6e6
    ),
    replace(
        BLOCKS,
        **{
            "seed": 1,
            "loss": 2.2,
            "flops": 1900.0,
            "wgrad_saved": 100.0,
            "own_flops": 38.0,
            "frozen": 4,
            "optimizer_bytes": 6_000_000,
        },
        **{"mean_optimizer_bytes": 6e6, "detected": 2, "imbalance": 1.6, "churn": 0.4},
    ),
    # Seed 0 only: more FLOPs, as many bytes.
    replace(PLAIN, arm="dear", loss=1.9, flops=1100.0, emerged=2),
    replace(PLAIN, arm="alone", seed=9, loss=5.0),
]
NAMES = ("dense", "thrifty", "not run", "dear", "alone")


def sweep(baseline: str | None) -> Sweep:
    return Sweep(Path("run.yaml"), 1, [0, 1, 2], baseline, [Arm(name, {}) for name in NAMES])


def cells(text: str) -> list[list[str]]:
    """Cells of a markdown table without the line below its head."""
    lines = [line.strip("|").split("|") for line in text.splitlines()]
    assert set("".join(lines[1])) == {"-"} and {len(line) for line in lines} == {len(lines[0])}
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def test_table_against_a_baseline() -> None:
    head, dense, thrifty, dear, alone = cells(markdown_table(sweep("dense"), RESULTS))
    assert head == (
        "arm|seeds|loss|vs dense|FLOPs|optimizer MB|frozen|detected|load|churn|own work|not spent|"
        "nats / % not spent|nats / % FLOPs|nats / % bytes"
    ).split("|")
    # (2.0 + 2.2 + 2.7) / 3 = 2.3, range 0.7; (1000 + 2000 + 1000) / 3; (10 + 14 + 10) / 3 MB.
    assert dense == (
        "dense|3|2.3000 ± 0.3500|+0.0000 ± 0.0000|1333|11.3 ± 2.0|0 ± 0|0 of 0|-|-|0.00 %|0.00 %|-|-|-"
    ).split("|")
    # Seed by seed the loss is 0.1 and 0.0 above the baseline's, so 0.05 for 7.5 % of the FLOPs and 32.5 % of the bytes.
    # Own work: (9 / 900 + 38 / 1900) / 2 = 1.5 %.
    assert thrifty == (
        "thrifty|2|2.1500 ± 0.0500|+0.0500 ± 0.0500|1400|7.5 ± 1.5|2.5 ± 1.5|5 of 8|1.40 ± 0.20|0.25 ± 0.15|1.50 %|"
        "7.50 %|+0.0067 (7.50 %)|+0.0067 (7.50 %)|+0.0015 (32.50 %)"
    ).split("|")
    assert dear == "dear|1|1.9000|-0.1000|1100|10.0|0|0 of 2|-|-|0.00 %|0.00 %|-|-|-".split("|")
    assert alone == "alone|1|5.0000|-|1000|10.0|0|0 of 0|-|-|0.00 %|0.00 %|-|-|-".split("|")


@pytest.mark.parametrize("baseline", [None, "not run"])
def test_table_without_a_baseline(baseline: str | None) -> None:
    head, *rows = cells(markdown_table(sweep(baseline), RESULTS))
    assert head == "arm|seeds|loss|FLOPs|optimizer MB|frozen|detected|load|churn|own work|not spent".split("|")
    assert [row[0] for row in rows] == ["dense", "thrifty", "dear", "alone"]
    assert rows[2] == "dear|1|1.9000|1100|10.0|0|0 of 2|-|-|0.00 %|0.00 %".split("|")


def test_table_of_nothing() -> None:
    assert len(cells(markdown_table(sweep("dense"), []))) == 1
