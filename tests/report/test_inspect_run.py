"""The command line tools/inspect_run.py: the logged numbers in its tables, new and missing fields, damaged logs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocte_ds.errors import MocteError
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from mocte_ds.report.run_table import block_table, run_text
from mocte_ds.text_table import brief
from tests.report.synthetic import write_dense_run, write_run
from tools.inspect_run import main

ROOT = Path(__file__).resolve().parents[2]


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the tool prints."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def section(text: str, title: str) -> list[dict[str, str]]:
    """Lines of the table under ``title``, by column; columns stand at least two spaces apart."""
    block = next(part for part in text.split("\n\n") if part.startswith(title + "\n"))
    head, *lines = [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()[1:]]
    assert all(len(line) == len(head) for line in lines)
    return [dict(zip(head, line, strict=True)) for line in lines]


def rewrite(folder: Path, change: Any) -> None:
    """Let ``change`` alter every check of a log."""
    log = folder / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        if event["event"] == "check":
            change(event)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture(scope="module")
def folder(whole: tuple[Path, dict[str, Any]]) -> Path:
    return whole[0]


@pytest.fixture
def checks(logs: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in logs["events"] if event["event"] == "check"]


def test_a_line_a_check_has_the_logged_numbers(
    folder: Path, checks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, folder)
    for block, label in enumerate(("block 0 (layer 2)", "block 1 (layer 3)")):
        lines = section(text, label)
        assert len(lines) == len(checks) == 60
        for line, check in zip(lines, checks, strict=True):
            entry = check["blocks"][block]
            values = [expert["lambda"] for expert in entry["experts"] if expert["lambda"] is not None]
            expected = {
                "step": brief(check["step"]),
                "share": f"{100 * check['step'] / 120:.3g} %",
                "mode": entry["mode"],
                "rows": "2,048",
                "certificate": "0.12",
                "rank": "5",
                "K": str(entry["clusters"]),
                "sizes": "100 90" if entry["sizes"] else "-",
                "found": "yes" if entry["found"] else "no",
                "noise": f"{entry['noise']:.3g}",
                "silhouette": f"{entry['silhouette']:.3g}",
                "stability": "-" if entry["stability"] is None else f"{entry['stability']:.3g}",
                "NMI": f"{entry['nmi']:.3g}",
                "purity": f"{entry['purity']:.3g}",
                "load": "1" if entry["load"] else "-",
                "lambda": f"{min(values):.3g}..{max(values):.3g}" if values else "-",
                "frozen": str(sum(expert["mode"] == "frozen" for expert in entry["experts"])),
            }
            if block == 0:  # the only one whose probe set routes; a column without numbers is left out
                expected["imbalance"] = "1.5..2" if entry["imbalance"] else "-"
            assert line == expected
    assert any(line["frozen"] == "1" for line in section(text, "block 0 (layer 2)"))


def test_costs_of_the_checks(folder: Path, checks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, folder)
    lines = section(text, "checks")
    assert len(lines) == len(checks)
    for line, check in zip(lines, checks, strict=True):
        assert line["tokens"] == brief(check["tokens"])
        assert (line["spectrum s"], line["clusters s"], line["trainability s"]) == ("0.02", "0.09", "0.05")
        assert line["all s"] == "0.16" and line["spectrum B"] == "9,216"
    # 60 checks of 0.16 s; 120 steps of 0.75 s.
    assert "checks took 9.6 s of 90 s of training, themselves included (10.7 %)" in text
    assert "step 120 of 120, 60 checks, 2 blocks" in text


def test_changes_with_their_reasons(folder: Path, logs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    events = [event for event in logs["events"] if event["event"] in ("emergence", "freeze", "thaw")]
    lines = section(shown(capsys, folder), "changes")
    assert {event["event"] for event in events} == {"emergence", "freeze", "thaw"}
    assert [line["event"] for line in lines] == [event["event"] for event in events]
    for line, event in zip(lines, events, strict=True):
        assert line["reason"] == event["reason"] and line["block"] == str(event["block"])
        assert line["expert"] == str(event.get("expert", "-"))
        assert line["lambda"] == brief(event.get("lambda"))
        before, after = (sum(event[f"optimizer_bytes_by_rank_{when}"]) / 1e6 for when in ("before", "after"))
        assert line["optimizer MB"] == f"{brief(before)} -> {brief(after)}"


def test_json_is_the_log_and_what_follows_from_it(
    folder: Path, logs: dict[str, Any], checks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(shown(capsys, folder, "--json"))
    assert (facts["steps"], facts["budget"], facts["notes"]) == (120, 120, [])
    assert [event["reason"] for event in facts["events"]] == [e["reason"] for e in logs["events"] if "reason" in e]
    for found, check in zip(facts["checks"], checks, strict=True):
        assert found["share"] == check["step"] / 120
        for entry, logged in zip(found["blocks"], check["blocks"], strict=True):
            assert logged.items() <= entry.items()
            values = [expert["lambda"] for expert in logged["experts"] if expert["lambda"] is not None]
            assert (entry["lambda_min"], entry["lambda_max"]) == (min(values, default=None), max(values, default=None))
            assert entry["load_max_mean"] == (1.0 if logged["load"] else None)
    last = json.loads(shown(capsys, folder, "--json", "--check", "last", "--block", "1"))
    assert [check["step"] for check in last["checks"]] == [120]
    assert [entry["block"] for entry in last["checks"][0]["blocks"]] == [1]


def test_one_check_in_full(folder: Path, checks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    check = checks[40]
    text = shown(capsys, folder, "--check", check["step"])
    assert f"check at step {check['step']}, 68.3 % of the budget" in text
    for entry in check["blocks"]:
        for name in set(entry) - {"block", "experts", "domain_load"}:
            assert re.search(rf"^  {name} +{re.escape(brief(entry[name], 4))}$", text, re.MULTILINE), name
        for name, row in entry["domain_load"].items():
            cells = r"\s+".join(re.escape(brief(value)) for value in row)
            assert re.search(rf"^{name}\s+{cells}$", text, re.MULTILINE)
        for expert in entry["experts"]:
            cells = (str(expert["expert"]), expert["mode"], brief(expert["tokens"]), re.escape(brief(expert["lambda"])))
            assert re.search(rf"^\s+{cells[0]}\s+{cells[1]}\s+{cells[2]}\s+{cells[3]}\s+-$", text, re.MULTILINE)
    assert text.count("expert  mode") == 2


def test_last_all_and_one_block(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, folder, "--check", "last")
    assert text.count("check at step") == 1 and "check at step 120, 100 % of the budget" in text
    text = shown(capsys, folder, "--check", "all", "--block", "1")
    assert text.count("check at step") == 60 and "block 0 (layer 2)" not in text
    text = shown(capsys, folder, "--block", "0")
    assert "block 1 (layer 3)" not in text and {line["block"] for line in section(text, "changes")} == {"0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check", "5"], "no check at step 5: they lie between steps 2 and 120, the nearest one at step 4"),
        (["--check", "first"], "--check first: give the step of a check, `last` or `all`"),
        (["--block", "7"], "there is no block 7 in .*; blocks: 0, 1"),
    ],
)
def test_what_is_not_there_is_refused(folder: Path, options: list[str], message: str) -> None:
    with pytest.raises(MocteError, match=message):
        main([str(folder), *options])


def test_new_fields_are_shown_under_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, steps=60, budget=60, experts=3)

    def change(check: dict[str, Any]) -> None:
        check["memory"] = 7 * check["step"]
        for entry in check["blocks"]:
            entry.update(churn=0.25, conflict={"cosine": -0.5, "R": 0.125, "why": "x"}, angles=[0.3, 0.1], note="long")
            entry["wide"] = {str(i): i for i in range(20)}
            for expert in entry["experts"]:
                expert.update(kappa=0.5 + expert["expert"], progress=None, words="x")

    rewrite(tmp_path, change)
    text = shown(capsys, tmp_path)
    for line in section(text, "block 0 (layer 2)"):
        assert (line["churn"], line["conflict.cosine"], line["conflict.R"]) == ("0.25", "-0.5", "0.125")
        assert (line["angles"], line["kappa"]) == ("0.1..0.3", "0.5..2.5")
        assert not {"note", "progress", "words", "conflict.why", "wide.3"} & set(line)
    assert section(text, "checks")[3]["memory"] == "28"
    full = shown(capsys, tmp_path, "--check", "last", "--block", "0")
    for words in ("churn ", "cosine=-0.5 R=0.125 why=x", "0.3 0.1", "long", "kappa  progress  words"):
        assert words in full


def test_fields_that_older_logs_lack_are_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, steps=60, budget=60)

    def change(check: dict[str, Any]) -> None:
        del check["bytes"], check["seconds"]
        for entry in check["blocks"]:
            for name in ("certified_rank", "load", "nmi", "experts", "mode"):
                del entry[name]

    rewrite(tmp_path, change)
    (tmp_path / "run.json").unlink()
    text = shown(capsys, tmp_path)
    for line in section(text, "block 1 (layer 3)"):
        missing = {name for name, cell in line.items() if cell == "-"} - {"stability", "sizes"}
        assert missing == {"share", "mode", "rank", "NMI", "load", "lambda", "frozen"}
    assert list(section(text, "checks")[0]) == ["step", "share", "tokens", "all s"]
    assert "step 60, 60 checks" in text


def test_values_of_the_wrong_kind_do_not_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, steps=30, budget=60)

    def change(check: dict[str, Any]) -> None:
        check["seconds"], check["bytes"] = "soon", {"spectrum": None}
        check["blocks"][0].update(sizes="x", load=[], experts=[None, 3, {"lambda": "?"}], nmi=float("nan"), rows=[1])
        check["blocks"][1].update(load=[0, 0], experts=None, domain_load={"a": [0.5], "b": []}, certificate="?")

    rewrite(tmp_path, change)
    text = shown(capsys, tmp_path)
    assert all(line["NMI"] == line["load"] == line["lambda"] == "-" for line in section(text, "block 0 (layer 2)"))
    assert all(line["certificate"] == "?" for line in section(text, "block 1 (layer 3)"))
    assert "share of a source's tokens" in shown(capsys, tmp_path, "--check", "last")
    json.loads(shown(capsys, tmp_path, "--json"))


def test_a_log_that_was_cut_off_is_shown_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, steps=60, budget=60)
    log = tmp_path / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:20]) + lines[20][:100])
    text = shown(capsys, tmp_path)
    assert "note: events.jsonl: 1 line(s) could not be read and are left out (line 21)." in text
    kept = [json.loads(line) for line in lines[:20]]
    assert len(section(text, "checks")) == sum(event["event"] == "check" for event in kept)


def test_runs_without_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dense_run(tmp_path, steps=5, budget=10)
    text = shown(capsys, tmp_path)
    assert "step 5 of 10, 0 checks, 0 blocks" in text and "no emergence, freeze or thaw yet" in text
    with pytest.raises(MocteError, match="has no check in its log yet"):
        main([str(tmp_path), "--check", "last"])
    with pytest.raises(MocteError, match="blocks: none"):
        main([str(tmp_path), "--block", "0"])


def test_older_events_have_bytes_by_rank_under_the_name_of_the_sum(tmp_path: Path) -> None:
    write_run(tmp_path, steps=5, budget=60)
    sizes = {"optimizer_bytes_before": [1_000_000, 2_000_000], "optimizer_bytes_after": 5_000_000}
    thaw = {"event": "thaw", "step": 4, "tokens": 4 * 8192, "block": 0, "expert": 1, "reason": "why", **sizes}
    with open(tmp_path / "events.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(thaw) + "\n")
    assert section(run_text(read_run(tmp_path)), "changes")[0]["optimizer MB"] == "3 -> 5"


def test_a_block_that_no_check_has(run: Run) -> None:
    assert block_table([], 0) == "" and run.blocks


def test_command_line(folder: Path, tmp_path: Path) -> None:
    program = f"{sys.executable} {ROOT / 'tools' / 'inspect_run.py'}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} {folder} --check all | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith(str(folder))
    done = subprocess.run([*program.split(), tmp_path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert "it has no metrics.jsonl" in done.stderr


def test_rows_of_the_fullest_rank(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against numpy, of two banks; a log without loads has no such line."""
    shutil.copytree(folder, tmp_path / "run")
    facts, experts = json.loads((folder / "run.json").read_text()), 4
    facts["deepspeed"]["mocte"]["num_experts"] = experts
    (tmp_path / "run/run.json").write_text(json.dumps(facts))
    drawn, given = np.random.default_rng(0), list[np.ndarray]()

    def change(event: dict[str, Any]) -> None:
        for entry in event["blocks"]:
            if entry["load"]:
                given.append(drawn.integers(1, 1000, (2, experts)))
                entry["load"] = given[-1].flatten().tolist()

    rewrite(tmp_path / "run", change)
    by_rank = np.stack(given).reshape(len(given), 2, 2, -1).sum(axis=(1, 3))
    ratios = by_rank.max(axis=1) / by_rank.mean(axis=1)
    facts = json.loads(shown(capsys, tmp_path / "run", "--json"))
    assert facts["slowest_ranks"]["2"] == pytest.approx([ratios.mean(), ratios.max()])
    text = f"rows of the fullest rank over the mean, on average and at most: 2 ranks {ratios.mean():.2f}"
    assert f"{text} ({ratios.max():.2f})" in shown(capsys, tmp_path / "run")
    rewrite(tmp_path / "run", lambda event: [entry.update(load=None) for entry in event["blocks"]])
    assert "fullest rank" not in shown(capsys, tmp_path / "run")
