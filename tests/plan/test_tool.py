"""tools/plan.py on the shipped run files."""

import json
from pathlib import Path

import pytest

from mocte_ds.errors import ConfigError
from tools.plan import main

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "launch" / "runs"


def test_7b_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--run", str(RUNS / "llama-7b.yaml"), "--gpus", "64", "--gpu-memory", "80"]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "37.038 B, 6.738 B of them active" in text and "fits 80 GB" in text
    # The page shows what the tool prints.
    for row in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if row.startswith("| ") and len(cells) == 6 and cells[0]:
            line = next(line for line in text.splitlines() if line.startswith(cells[0]))
            numbers = [float(number) for number in line.removeprefix(cells[0]).split()]
            assert numbers == [float(cell) if cell else 0.0 for cell in cells[1:]], row
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["growth"][3]["gpus"] == 64 and found["growth"][-1]["best"]["ep_size"] <= 8


@pytest.mark.parametrize(
    ("name", "gpus"), [("quickstart", 2), ("gpt-140m", 8), ("gpt-750m", 8), ("cpu-small", 2), ("cpu-wide", 2)]
)
def test_every_run_file_has_a_plan(name: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(RUNS / f"{name}.yaml"), "--gpus", str(gpus), "--hardware", "h200"]) == 0
    assert "layouts that fit" in capsys.readouterr().out


def test_refusals(tmp_path: Path) -> None:
    run = ["--run", str(RUNS / "llama-7b.yaml")]
    for more, told in (
        (["--gpus", "0"], "--gpus must be 1 or more"),
        (["--gpus", "12"], "ep_size = 8 must divide the 12 ranks"),
        (["--gpus", "64", "--gpu-memory", "-1"], "must be more than 0"),
        (["--gpus", "64", "--hardware", "b200"], "says nothing of 'b200'; it has h100, h200"),
        (["--gpus", "64", "--hardware-file", str(tmp_path / "none.yaml")], "none.yaml"),
    ):
        with pytest.raises(ConfigError, match=told):
            main([*run, *more])
