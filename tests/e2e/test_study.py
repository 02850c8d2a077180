"""A study through the real launcher: a dense arm and one with blocks, one that fails, and what a second call finds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mocte_ds.study import RunResult, all_tables, read_study
from tests.e2e.conftest import LIMIT, ROOT, read_log
from tools.study import main

Write = Callable[[bool], Path]


def study(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of tools/study.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "study.py", *map(str, arguments)]
    tool = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = tool.communicate(timeout=3 * LIMIT)
    finally:
        tool.terminate()  # if it hangs: it ends the run that it started
        tool.wait()
    return tool.returncode, output, errors


def test_two_arms_and_one_that_fails(
    deepspeed_op: Path, run_file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router = {"kind": "random", "weight": "softmax", "learn": True}
    values = {
        "run": run_file(True).name,
        "processes": 1,  # starting more is tested elsewhere and takes longer
        "seeds": [5],
        "baseline": "dense",
        "set": {
            **{"training.steps": 6, "training.checkpoint_every": 6, "evaluation.every": 3},
            "deepspeed.mocte.ep_size": 1,
        },
        "arms": {
            "dense": {"deepspeed.mocte": None},
            "switch": {"deepspeed.mocte.router": router, "deepspeed.mocte.clusters": {"not_before": 0, "deadline": 0}},
            "broken": None,
        },
    }
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    # Its folder has a checkpoint that is not there.
    (out / "broken-seed5" / "checkpoints").mkdir(parents=True)
    (out / "broken-seed5" / "checkpoints" / "latest").write_text("step3", encoding="utf-8")

    code, output, errors = study(file, "--out", out)
    assert code == 2 and "Traceback" not in errors, errors
    log = out / "broken-seed5.log"
    assert errors.startswith("error: broken-seed5 ended with exit code 2: ") and errors.count("\n") == 1
    assert "names the checkpoint 'step3', which is not there" in errors and f"Its output is in {log}." in errors
    assert "[2/3] switch-seed5: done, loss " in output
    (dense, switch) = json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"]
    for result in (dense, switch):
        rows = read_log(out / f"{result['arm']}-seed5")
        assert (result["steps"], result["tokens"], result["seed"]) == (6, 6 * 512, 5)
        assert result["loss"] == rows[-1]["validation"]["mean"] and result["flops"] == rows[-1]["flops"]
        assert result["mean_optimizer_bytes"] == sum(row["optimizer_bytes"] for row in rows) / 6
    assert (dense["emerged"], dense["own_flops"]) == (0, 0) and "expert_load" in rows[-1]
    assert switch["emerged"] == 2 and switch["own_flops"] > 0 and switch["imbalance"] >= 1
    facts = json.loads((out / "switch-seed5" / "run.json").read_text(encoding="utf-8"))
    assert facts["training"]["seed"] == 5 and facts["deepspeed"]["mocte"]["router"]["kind"] == "random"
    assert "mocte" not in json.loads((out / "dense-seed5" / "run.json").read_text(encoding="utf-8"))["deepspeed"]
    saved = torch.load(next((out / "switch-seed5" / "checkpoints" / "step6").glob("mp_rank_00_*")), weights_only=False)
    residuals = [value for name, value in saved["module"].items() if name.endswith("cluster_residual")]
    assert len(residuals) == 2 and all(bool(value.any()) for value in residuals), "Switch's router learns"

    # The second call finds both, starts nothing, and writes the same table.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if not path.name.startswith(("results", "out"))}
    table = (out / "results.md").read_text(encoding="utf-8")
    assert main([str(file), "--out", str(out), "--only", "switch"]) == 0
    output = capsys.readouterr().out
    assert "[1/2] dense-seed5: found" in output and "[2/2] switch-seed5: found" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (out / "results.md").read_text(encoding="utf-8") == table
    plan, runs = read_study(file), json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"]
    results = [RunResult(**run) for run in runs]
    assert [result.arm for result in results] == ["dense", "switch"]
    # The switch of four experts in two blocks, counted on the checkpoint: less the FFNs of which they were born.
    shared = sum(
        value.numel() for name, value in saved["module"].items() if ".dense." not in name and "cluster_" not in name
    )
    routers = sum(value.numel() for value in residuals)
    files = (out / "switch-seed5" / "checkpoints" / "step6").glob("layer_*_expert_*_model_states.pt")
    experts = sum(v.numel() for file in files for v in torch.load(file, weights_only=False).values())
    assert results[1].parameters == shared + routers + experts
    assert table == "\n\n".join(found.markdown() for found in all_tables(plan, results)) + "\n"
    assert "| vs dense |" in table and 'id="figure-losses"' in (out / "index.html").read_text(encoding="utf-8")
