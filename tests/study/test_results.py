"""What is read from a run's folder, and the tables, against numbers worked out by hand."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.errors import MocteError, NonFiniteLoss
from mocte_ds.study import Arm, PlannedRun, RunResult, Study, all_tables, read_result
from mocte_ds.study.page import study_page
from mocte_ds.study.tables import Table
from mocte_ds.training.lost import write_cause
from tests.report.synthetic import write_dense_run, write_run

STEPS = 300
SIZES = (4000, 1000)


def planned(name: str, seed: int = 0) -> PlannedRun:
    return PlannedRun(Arm(name, {}), seed)


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
    found = read_result(tmp_path, planned("mine", 7), SIZES)
    assert found is not None
    assert (found.arm, found.seed, found.steps, found.tokens) == ("mine", 7, STEPS, STEPS * 8192)
    # The story's four domains: 2.6, 2.9, 3.2, 3.5 and what is left of 5.2 nats in all of them.
    assert found.loss == pytest.approx(3.05 + 5.2 * math.exp(-6))
    assert found.loss == pytest.approx(sum(found.domains.values()) / 4) and len(found.domains) == 4
    assert (found.parameters, found.active, found.budget, found.trial) == (4000, 1000, 1.0, False)
    assert found.rate == logs["facts"]["training"].get("learning_rate", 0.0)
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
    for entry in (block for event in logs["events"] for block in event.get("blocks", ())):
        entry.pop("imbalance", None)
    write_lines(tmp_path / "events.jsonl", logs["events"])
    (tmp_path / "run.json").write_text(json.dumps(logs["facts"]), encoding="utf-8")
    found = read_result(tmp_path, planned("mine"), SIZES)
    # Banks of two experts: 30 of 40 where 20 would be even, and 20 of 40; the other block routes nothing yet.
    assert found is not None and found.imbalance == pytest.approx((1.5 + 1.0) / 2) and found.churn is None


def test_a_dense_run(tmp_path: Path) -> None:
    write_dense_run(tmp_path)
    found = read_result(tmp_path, planned("dense"), SIZES)
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
    assert read_result(tmp_path, planned("mine"), SIZES) is None
    assert read_result(tmp_path / "nowhere", planned("mine"), SIZES) is None


@pytest.mark.parametrize(
    ("what", "missing"),
    [
        ("no validation at the end", "validation loss"),
        ("the ledger is damaged", "FLOPs"),
    ],
)
def test_what_is_done_but_has_no_numbers_is_refused(tmp_path: Path, what: str, missing: str) -> None:
    damaged(tmp_path, what)
    with pytest.raises(MocteError, match=f"has reached its last step, but its logs have no {missing} of it"):
        read_result(tmp_path, planned("mine"), SIZES)


@pytest.mark.parametrize("how", ["the loss is NaN", "stopped by the trainer"])
def test_what_diverged_is_worse_than_anything(tmp_path: Path, how: str) -> None:
    damaged(tmp_path, "not at the end" if how == "stopped by the trainer" else how)
    if how == "stopped by the trainer":
        write_cause(tmp_path, 0, NonFiniteLoss("the loss of step 7 is nan"))
    found = read_result(tmp_path, PlannedRun(Arm("mine", {}), 3, 0.5, 0.2, trial=True), SIZES)
    assert found is not None and found.diverged and (found.arm, found.seed, found.rate) == ("mine", 3, 0.5)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["loss"] is None
    losses = all_tables(study(), [PLAIN, replace(found, arm="dear", trial=False, budget=1.0, seed=0)])[0]
    assert losses.rows[1][3:] == ["diverged", "-", "-", "-", "-", "-"]
    trials = [replace(PLAIN, arm="mine", trial=True, rate=0.1), found]
    table = next(
        entry for entry in all_tables(replace(study(), arms=[Arm("mine", {})]), trials) if entry.name == "trials"
    )
    assert table.rows == [["mine", "2.0000", "diverged", "0.1"]]
    assert study_page(study(), [PLAIN, replace(found, arm="dear", trial=False)], [], "some", 9)


# The baseline with three seeds, an arm that saves, one that costs more, and one whose seed the baseline lacks.
PLAIN = RunResult(
    arm="dense",
    seed=0,
    rate=0.01,
    budget=1.0,
    trial=False,
    steps=100,
    tokens=1000,
    loss=2.0,
    domains={"law": 1.5, "news": 2.5},
    parameters=100,
    active=50,
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


def study(baseline: str | None = "dense") -> Study:
    return Study(Path("run.yaml"), 1, [0, 1, 2], baseline, [Arm(name, {}) for name in NAMES])


def table(name: str, results: list[RunResult], baseline: str | None = "dense") -> list[list[str]]:
    """Cells of a table, as results.md has it, without the line below its head."""
    found: dict[str, Table] = {entry.name: entry for entry in all_tables(study(baseline), results)}
    lines = [line.strip("|").split("|") for line in found[name].markdown().splitlines() if line.startswith("|")]
    assert set("".join(lines[1])) == {"-"} and {len(line) for line in lines} == {len(lines[0])}
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def test_losses_against_a_baseline() -> None:
    head, dense, thrifty, dear, alone = table("losses", RESULTS)
    assert head == "arm|seeds|learning rate|loss|vs dense|p|x tokens|x FLOPs|x seconds".split("|")
    # (2.0 + 2.2 + 2.7) / 3 = 2.3, range 0.7.
    assert dense == "dense|3|0.01|2.3000 ± 0.3500|+0.0000 ± 0.0000|-|1.00|1.00|1.00".split("|")
    # Seed by seed the loss is 0.1 and 0.0 above: t = 0.05 / (0.0707 / sqrt(2)) = 1, of which p = 0.5 with one degree.
    assert thrifty[:6] == "thrifty|2|0.01|2.1500 ± 0.0500|+0.0500 ± 0.0500|0.5".split("|")
    # By the seeds 0 and 1, that both have: 2.15 against 2.1, so less than the baseline's only budget would do.
    assert thrifty[6:] == ["< 1.00", "< 1.07", "< 1.00"]  # 1500 / 1400 FLOPs
    assert dear[:6] == "dear|1|0.01|1.9000|-0.1000|-".split("|")
    assert alone == "alone|1|0.01|5.0000|-|-|-|-|-".split("|")


def test_costs_and_what_freezing_bought() -> None:
    _, dense, thrifty, dear, _ = table("costs", RESULTS)
    # (1000 + 2000 + 1000) / 3; (10 + 14 + 10) / 3 MB; 1000 tokens for 50 active parameters.
    assert dense == "dense|0.0001|5e-05|20.0|1333|0.00 %|11.3 ± 2.0|-|-|0 of 0".split("|")
    # Own work: (9 / 900 + 38 / 1900) / 2 = 1.5 %.
    assert thrifty[4:] == "1400|1.50 %|7.5 ± 1.5|1.40 ± 0.20|0.25 ± 0.15|5 of 8".split("|")
    assert dear[4:] == "1100|0.00 %|10.0|-|-|0 of 2".split("|")
    head, *rows = table("freezing", RESULTS)
    assert head == "arm|frozen|not spent|nats / % not spent|nats / % FLOPs|nats / % bytes".split("|")
    # 0.05 nats for 7.5 % of the FLOPs and 32.5 % of the bytes.
    wanted = "thrifty|2.5 ± 1.5|7.50 %|+0.0067 (7.50 %)|+0.0067 (7.50 %)|+0.0015 (32.50 %)".split("|")
    assert rows == [wanted], "arms that freeze nothing are left out"


def test_losses_by_domain() -> None:
    mine = [replace(PLAIN, arm="dear", seed=seed, domains={"law": 1.4 + seed / 10, "news": 2.8}) for seed in (0, 1)]
    head, row = table("domains", [PLAIN, replace(PLAIN, seed=1), *mine])
    assert head == ["arm", "law", "news"] and row == ["dear", "-0.050 ± 0.050", "+0.300 ± 0.000"]


def test_the_baseline_by_budget_and_trials_by_rate() -> None:
    longer = replace(PLAIN, budget=2.0, tokens=2000, loss=1.8, seconds=3.0)
    trials = [
        replace(PLAIN, arm=arm, trial=True, budget=0.2, rate=rate, loss=loss, steps=20)
        for arm, rate, loss in (("dense", 0.01, 3.0), ("dense", 0.02, 2.5), ("dear", 0.01, 4.0))
    ]
    results = [PLAIN, longer, replace(PLAIN, arm="dear", loss=1.9, rate=0.02), *trials]
    _, first, second = table("budgets", results)
    assert first == "1|1|2.0000|1,000|20.0|1000|1".split("|") and second == "2|1|1.8000|2,000|40.0|1000|3".split("|")
    head, *rows = table("trials", results)
    assert head == ["arm", "0.01", "0.02", "best"]
    assert rows == [["dense", "3.0000", "2.5000", "0.02"], ["dear", "4.0000", "-", "0.01"]]
    losses = {row[0]: row for row in table("losses", results)}
    # Half way between 2.0 and 1.8 on a logarithmic scale of tokens.
    assert losses["dense"][6] == "1.00" and losses["dear"][6] == "1.41" and losses["dense"][2] == "0.01 (edge)"


@pytest.mark.parametrize("baseline", [None, "not run"])
def test_tables_without_a_baseline(baseline: str | None) -> None:
    head, *rows = table("losses", RESULTS, baseline)
    assert head == "arm|seeds|learning rate|loss".split("|")
    assert [row[0] for row in rows] == ["dense", "thrifty", "dear", "alone"]
    assert {entry.name for entry in all_tables(study(baseline), RESULTS)} == {"losses", "costs", "freezing"}


def test_tables_of_nothing() -> None:
    assert all_tables(study(), []) == []


def test_the_page_has_every_table_and_figure_and_needs_nothing_else() -> None:
    curve = tuple((100.0 * n, 100.0 * n, n, 4.0 - n / 10) for n in range(1, 11))
    results = [replace(run, curve=curve) for run in RESULTS]
    results += [replace(PLAIN, trial=True, rate=rate) for rate in (0.01, 0.02)] + [replace(PLAIN, budget=2.0, loss=1.8)]
    tables = all_tables(study(), results)
    shown = study_page(study(), results, tables, "<some>", 20)
    assert all(f'id="table-{entry.name}"' in shown for entry in tables) and len(tables) == 6
    for figure in ("losses", "curves", "domains", "trials"):
        assert re.search(f'id="figure-{figure}"><img src="data:image/png;base64,[A-Za-z0-9+/]{{5000,}}=*"', shown), (
            figure
        )
    assert "&lt;some&gt;" in shown and not re.search(r"https?://|<script", shown)
    for run in results:
        assert json.loads(json.dumps(run.to_dict()))["arm"] == run.arm
    empty = study_page(study(), [], [], "nothing yet", 15)
    assert "0 of 15 runs are done" in empty and "<figure" not in empty
