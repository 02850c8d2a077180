"""The page that compares runs, against the logs of invented ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocte_ds.errors import MocteError
from mocte_ds.report import read_run
from mocte_ds.report.comparison import write_comparison
from mocte_ds.report.comparison.figure import curve, draw, uses_validation
from mocte_ds.report.settings import differing
from tests.report.parsed import Page
from tests.report.synthetic import write_dense_run, write_run
from tests.report.test_tool import tool

STEPS = 120


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of a run with blocks, of a dense one, and of one whose log has neither validations nor FLOPs."""
    folder = tmp_path_factory.mktemp("runs")
    logs = {"blocks": write_run(folder / "blocks", steps=STEPS, budget=STEPS, seed=1)}
    logs["dense"] = write_dense_run(folder / "dense", steps=100, budget=STEPS, seed=2)
    bare = write_run(folder / "bare", steps=STEPS, budget=STEPS, seed=3)
    rows = [{k: v for k, v in row.items() if k not in ("validation", "flops")} for row in bare["metrics"]]
    (folder / "bare" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bare" / "ledger.json").unlink()
    return {"folder": folder, "logs": logs}


def test_the_page_has_the_numbers_of_the_logs(runs: dict[str, Any], tmp_path: Path) -> None:
    folder, logs = runs["folder"], runs["logs"]
    found = write_comparison([folder / "blocks", folder / "dense"], tmp_path)
    made = Page((tmp_path / "index.html").read_text())
    losses = {row[0]: row[1:] for row in made.tables["table-losses"][1:]}
    for name, steps in (("blocks", STEPS), ("dense", 100)):
        metrics = logs[name]["metrics"]
        last = next(row["validation"] for row in reversed(metrics) if "validation" in row)
        training = np.mean([row["loss"] for row in metrics[-max(1, round(0.05 * len(metrics))) :]])
        assert losses[name][:3] == [str(steps), f"{100 * steps / STEPS:.1f} %", f"{training:.4f}"]
        assert losses[name][3:] == [f"{value:.4f}" for value in last.values()]
        assert found["runs"][name]["tokens"] == metrics[-1]["tokens"]
    costs = {row[0]: row[1:] for row in made.tables["table-costs"][1:]}
    spent = logs["blocks"]["ledger"]
    own = sum(spent[name] for name in ("routing", "sampling", "spectrum", "clusters", "trainability"))
    assert costs["blocks"][1:3] == [f"{spent['total']:.3e}", f"{100 * own / spent['total']:.2f} %"]
    assert costs["dense"][2] == "0.00 %" and costs["dense"][7] == "75.0 s"
    events = {row[0]: row[1:] for row in made.tables["table-events"][1:]}
    assert events["blocks"][0] == "2 of 2" and events["blocks"][2] == "1" and events["dense"][0] == "0 of 0"
    assert "All runs have read the same prepared data" in made.text
    assert "100 of 120 optimizer steps" in made.text, "a run that was stopped is said to be"


def test_settings_that_differ(runs: dict[str, Any], tmp_path: Path) -> None:
    folder = runs["folder"]
    facts = json.loads((folder / "blocks" / "run.json").read_text())
    other = tmp_path / "other"
    write_run(other, steps=10, budget=STEPS)
    facts["deepspeed"]["mocte"]["num_experts"] = 8
    facts["data"]["manifest_sha256"] = "f" * 64
    facts["command"] = "another"
    (other / "run.json").write_text(json.dumps(facts))
    found = differing({"a": read_run(folder / "blocks"), "b": read_run(other)})
    assert found.pop("data.manifest_sha256")["b"] == "f" * 64
    assert found == {"deepspeed.mocte.num_experts": {"a": 4, "b": 8}}
    write_comparison([folder / "blocks", other], tmp_path / "page")
    made = Page((tmp_path / "page" / "index.html").read_text())
    assert ["deepspeed.mocte.num_experts", "4", "8"] in made.tables["table-settings"]
    assert "have read different data" in made.text


def test_the_figure_has_a_line_a_run_on_each_clock(runs: dict[str, Any]) -> None:
    found = {name: read_run(runs["folder"] / name) for name in ("blocks", "dense", "bare")}
    both = {name: found[name] for name in ("blocks", "dense")}
    assert uses_validation(both) and not uses_validation(found)
    figure = draw(both, narrow=False)
    assert figure is not None and [len(axis.lines) for axis in figure.axes] == [2, 2, 2]
    for axis, name in zip(figure.axes, ("tokens", "flops", "seconds"), strict=True):
        rows = [row for row in runs["logs"]["dense"]["metrics"] if "validation" in row]
        line = axis.lines[1]
        assert line.get_ydata().tolist() == pytest.approx([row["validation"]["mean"] for row in rows])
        reading = [0.75 * row["step"] if name == "seconds" else row[name] for row in rows]
        shown = np.asarray(line.get_xdata())
        assert (shown / shown[-1]).tolist() == pytest.approx([value / reading[-1] for value in reading])
    # Losses of training where one run has no validations; no FLOPs, no line.
    figure = draw(found, narrow=True)
    assert figure is not None and [len(axis.lines) for axis in figure.axes] == [3, 2, 3]
    rows, losses = curve(found["bare"], validated=False)
    own = column_of(found["bare"])
    assert len(rows) == 40 and losses[-1] == pytest.approx(np.mean(own[-3:])) and rows[-1] == STEPS - 1


def column_of(run: Any) -> list[float]:
    return [row["loss"] for row in run.metrics]


def test_command_line(runs: dict[str, Any], tmp_path: Path) -> None:
    folder = runs["folder"]
    done = tool(folder / "blocks", folder / "bare", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["runs"]) == {"blocks", "bare"} and result["runs"]["bare"]["loss"] is None
    text = (tmp_path / "index.html").read_text()
    assert "The log of bare has no FLOPs." in text and "http" not in text
    assert "table-costs" in text and text.count("data:image/png") == 2


def test_names_and_refusals(runs: dict[str, Any], tmp_path: Path) -> None:
    folder = runs["folder"]
    with pytest.raises(MocteError, match="was named twice"):
        write_comparison([folder / "blocks", folder / "." / "blocks"], tmp_path)
    write_run(tmp_path / "later" / "blocks", steps=4, budget=STEPS)
    found = write_comparison([folder / "blocks", tmp_path / "later" / "blocks"], tmp_path / "page")
    assert all(name.endswith("/blocks") for name in found["runs"])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "index.html").write_text("of the user")
    with pytest.raises(MocteError, match="was not written by mocte-ds"):
        write_comparison([folder / "blocks", folder / "dense"], tmp_path / "theirs")
