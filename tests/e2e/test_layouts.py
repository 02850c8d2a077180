"""A run of launch/pretrain.py that goes on with another number of ranks and another ep_size learns the same."""

from collections.abc import Callable
from pathlib import Path

from pytest import approx

from mocte_ds.checkpoints.reshaping.reshape import reshape
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
