"""A run of launch/pretrain.py that goes on with another number of ranks and another ep_size learns the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pytest import approx

from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.training.changes import IDENTITY_FILE
from tests.checkpoints.damage import seal
from tests.e2e.conftest import Launcher, read_log

# fp32, and a check that decides at once: what one has measured and not decided on stays behind.
SETTINGS = ["--set", "deepspeed.bf16.enabled=false", "--set", "deepspeed.mocte.apply_after=0"]


def test_four_ranks_then_two(launch: Launcher, run_file: Callable[[bool], Path], tmp_path: Path) -> None:
    run, whole, parts = run_file(True), tmp_path / "whole", tmp_path / "parts"
    code, output = launch.pretrain(run, whole, *SETTINGS)
    assert code == 0, output
    begin = launch.start("launch/pretrain.py", "--run", run, "--out", parts, "--stop-after", 10, *SETTINGS, processes=4)
    code, output = launch.finish(begin)
    assert code == 0, output
    reshape(parts / "checkpoints", tmp_path / "cut", 2, 2)
    cut = tmp_path / "on"
    code, output = launch.pretrain(run, cut, *SETTINGS, "--resume", tmp_path / "cut", "--stop-after", 13)
    assert code == 0 and "brought to" not in output, output
    code, output = launch.pretrain(run, parts, *SETTINGS, "--set", "deepspeed.mocte.ep_size=1")
    assert code == 0 and "written by 4 ranks with ep_size 2; it is brought to 2 ranks with ep_size 1" in output, output
    expected, found = read_log(whole), read_log(parts)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["loss"] for row in found] == approx([row["loss"] for row in expected], rel=0, abs=1e-5)
    assert [row["loss"] for row in read_log(cut)] == approx([row["loss"] for row in expected[10:13]], rel=0, abs=1e-5)
    (resume,) = [event for event in read_log(parts, "events") if event["event"] == "resume"]
    assert resume["position"] == 10 * 16 and "brought to 2 ranks" in resume["note"]
    assert any(sum(load) for row in expected[:10] for load in row["expert_load"]), "experts had emerged by then"


def rewrite(folder: Path, change: Callable[[dict, dict], None]) -> None:
    """Change what a checkpoint says of its "mocte" block and its run, and let its manifest agree."""
    state, path = torch.load(folder / STATE_FILE, weights_only=True), folder / IDENTITY_FILE
    identity = json.loads(path.read_text())
    change(state["mocte"]["config"], identity)
    torch.save(state, folder / STATE_FILE)
    path.write_text(json.dumps(identity))
    seal(folder)


def older(mocte: dict, identity: dict) -> None:
    """As before several experts per token were known, and with a version of transformers that has other keys."""
    for key in ("top_k", "normalise", "scale"):
        del mocte["router"][key]
    del identity["model.init"], identity["model.hf.pretraining_tp"]
    identity["model.hf.of_another_version"] = 5


def test_a_checkpoint_of_an_older_version(launch: Launcher, run_file: Callable[[bool], Path], tmp_path: Path) -> None:
    """What it does not say is as it was then."""
    run, whole, parts = run_file(True), tmp_path / "whole", tmp_path / "parts"
    code, output = launch.pretrain(run, whole, *SETTINGS, "--stop-after", 10)
    assert code == 0, output
    shutil.copytree(whole, parts)
    rewrite(parts / "checkpoints" / "step10", older)
    for folder in (whole, parts):
        code, output = launch.pretrain(run, folder, *SETTINGS, "--stop-after", 12)
        assert code == 0, output
    assert [row["loss"] for row in read_log(parts)] == [row["loss"] for row in read_log(whole)]


def test_attention_cut_over_two_ranks(launch: Launcher, run_file: Callable[[bool], Path], tmp_path: Path) -> None:
    """Stopped and resumed on four processes, with the steps of two that cut nothing."""
    run, whole, cut = run_file(True), tmp_path / "whole", tmp_path / "cut"
    code, output = launch.pretrain(run, whole, *SETTINGS)
    assert code == 0, output
    tensor = [*SETTINGS, "--set", "deepspeed.tensor_parallel.autotp_size=2"]
    for more in (["--stop-after", 10], []):
        begin = launch.start("launch/pretrain.py", "--run", run, "--out", cut, *tensor, *more, processes=4)
        code, output = launch.finish(begin)
        assert code == 0, output
    expected, found = read_log(whole), read_log(cut)
    for name in ("loss", "grad_norm", "tokens"):
        assert [row[name] for row in found] == approx([row[name] for row in expected], rel=1e-5), name
    assert [row["expert_load"] for row in found] == [row["expert_load"] for row in expected]
