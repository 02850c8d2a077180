"""Pre-training through the real launcher on two processes: interrupted runs, bad values, full disks."""

import gzip
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.checkpoints.damage import flip
from tests.e2e.conftest import LIMIT, ROOT, Launcher, read_log, wait_for_step
from tests.spawn import free_port

Write = Callable[[bool], Path]
VARYING = ("seconds", "mfu", "tokens_per_second", "rank_seconds", "slowest_rank")
VARYING += ("rank_seconds_p50", "rank_seconds_p95", "slowest_of_last")
BLOCK_PARTS = {"gate", "dispatch", "experts", "all-to-all", "reduction of gradients"}
COMET = "deepspeed.comet={enabled: false, api_key: S3CRET}"


def what_is_learned(folder: Path) -> list[dict]:
    """The log without clocks."""
    return [{key: value for key, value in row.items() if key not in VARYING} for row in read_log(folder)]


def require_profile(folder: Path, output: str, parts: set[str]) -> None:
    """The parts of two profiled steps: in the log, on the screen, and a trace of each rank."""
    (event,) = [event for event in read_log(folder, "events") if event["event"] == "profile"]
    assert event["step"] == 8 and event["steps"] == 2
    assert parts | {"self_attn", "data", "optimizer", "logging"} <= event["parts"].keys()
    assert all(min(event["parts"][name]) > 0 for name in ("self_attn", "lm_head"))
    assert sum(map(sum, event["parts"].values())) == pytest.approx(event["seconds"])
    assert "backward ms" in output
    for rank in range(2):
        with gzip.open(folder / "profile" / f"rank-{rank}.json.gz", "rt", encoding="utf-8") as trace:
            assert json.load(trace)["traceEvents"]


@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
def test_interrupted_run_equals_uninterrupted(launch: Launcher, run_file: Write, tmp_path: Path, blocks: bool) -> None:
    run, whole, parts = run_file(blocks), tmp_path / "whole", tmp_path / "parts"
    code, output = launch.pretrain(run, whole, "--set", "watch.peak_tflops=0.001", "--set", COMET)
    assert code == 0, output
    code, output = launch.pretrain(run, parts, "--stop-after", 10, "--profile", "7-8")
    assert code == 0, output
    require_profile(parts, output, BLOCK_PARTS if blocks else {"mlp"})
    assert len(read_log(parts)) == 10 and "stopped at step 10" in output
    code, output = launch.pretrain(run, parts)
    assert code == 0, output
    assert what_is_learned(parts) == what_is_learned(whole)
    assert '"comet"' in (whole / "run.json").read_text(encoding="utf-8")
    assert not [path for path in whole.rglob("*") if path.is_file() and b"S3CRET" in path.read_bytes()]

    rows = read_log(whole)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["tokens"] == 20 * 512
    assert rows[-1]["validation"]["mean"] < rows[4]["validation"]["mean"]
    assert set(rows[-1]["validation"]) == {"letters", "numbers", "mean"}
    assert all(a["flops"] < b["flops"] for a, b in zip(rows, rows[1:], strict=False))
    kept = sorted(path.name for path in (whole / "checkpoints").glob("step*"))
    assert kept == ["step18", "step20"]
    assert "resume" in [event["event"] for event in read_log(parts, "events")]
    if blocks:
        events = [event["event"] for event in read_log(whole, "events")]
        assert events.count("check") == 10 and events.count("emergence") == 2
        assert all(sum(load) == 512 for load in rows[-1]["expert_load"])
        assert all(row["mfu"] > 0 for row in rows) and "mfu" not in read_log(parts)[0]
        return
    # All that a dense run spends is the model's; two devices of 1e9 FLOP/s.
    for before, row in zip(rows, rows[1:], strict=False):
        assert row["mfu"] == pytest.approx((row["flops"] - before["flops"]) * row["tokens_per_second"] / 512 / 2e9)

    code, output = launch.pretrain(run, whole)
    assert code == 0 and "done already" in output
    assert what_is_learned(parts) == what_is_learned(whole)


def test_terminated_run_saves_and_goes_on(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    run, out = run_file(False), tmp_path / "out"
    process = launch.start("launch/pretrain.py", "--run", run, "--out", out, "--set", "training.steps=100000")
    wait_for_step(out, 3)
    # As a scheduler does it: the ranks get the signal, here one of them.
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    ranks[0].send_signal(signal.SIGTERM)
    code, output = launch.finish(process)
    assert code == 0, output
    stopped = len(read_log(out))
    assert (out / "checkpoints" / "latest").read_text(encoding="utf-8") == f"step{stopped}"
    assert f"stopped at step {stopped}" in output


def test_a_killed_rank_ends_the_run_in_few_words(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    run, out = run_file(False), tmp_path / "out"
    process = launch.start("launch/pretrain.py", "--run", run, "--out", out, "--set", "training.steps=100000")
    wait_for_step(out, 7)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    ranks[0].kill()
    code, output = launch.finish(process)
    lines = [line for line in output.splitlines() if not line.startswith("training ") and "Warning" not in line]
    assert code != 0 and "Traceback" not in output and len(lines) < 15, output
    assert (out / "checkpoints" / "latest").read_text(encoding="utf-8").startswith("step")


def test_torchrun_restarts_a_run_by_itself(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    """A killed rank: both start again, and the run goes on from its last checkpoint to its end."""
    run, out = run_file(False), tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(free_port()), "launch/pretrain.py", "--run-file", str(run), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--set", "training.steps=60"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_step(out, 7)
        ranks = [p for p in psutil.Process(process.pid).children() if "launch/pretrain.py" in p.cmdline()]
        assert len(ranks) == 2
        ranks[1].kill()
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 0 and "done at step 60" in output, output
    assert [row["step"] for row in read_log(out)] == list(range(1, 61))
    assert "resume" in [event["event"] for event in read_log(out, "events")]


def test_full_disk_leaves_the_last_checkpoint(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    run, out = run_file(False), tmp_path / "out"
    code, output = launch.pretrain(run, out, "--stop-after", 2)
    assert code == 0, output
    # No file may grow over 20 KiB: the logs fit, the weights do not.
    code, output = launch.pretrain(run, out, file_size=20 * 1024)
    assert code == 2 and "Traceback" not in output, output
    assert "could not save the checkpoint" in output and "The last good checkpoint (step2) is untouched" in output
    code, output = launch.pretrain(run, out, "--set", "model.num_hidden_layers=3")
    assert code == 2 and "Traceback" not in output, output
    assert "model.hf.num_hidden_layers: checkpoint 2, run 3" in output
    (shard,) = (out / "checkpoints" / "step2").glob("*_pp_rank_1_*")
    flip(shard, 0.5)
    code, output = launch.pretrain(run, tmp_path / "other", "--resume", out)
    assert code == 2 and "Traceback" not in output, output
    assert f"{shard.name} was changed" in output and not (tmp_path / "other").exists()
    flip(shard, 0.5)
    code, output = launch.pretrain(run, out, "--stop-after", 8)
    assert code == 0, output
    assert [row["step"] for row in read_log(out)] == list(range(1, 9))


def test_non_finite_loss_stops_the_run(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    # Weights of this size overflow in the forward pass.
    changes = ["--set", "training.learning_rate=1e30", "--set", "training.gradient_clipping=1e30"]
    code, output = launch("launch/pretrain.py", "--run", run_file(False), "--out", tmp_path, *changes)
    assert code == 2 and "Traceback" not in output, output
    assert "of step 3 is" in output and "last good checkpoint" in output
    assert output.count("error: ") == 1, "the same message from every rank"
    assert not (tmp_path / "checkpoints" / "latest").exists()
    assert len(read_log(tmp_path)) == 2


def test_finished_run_goes_on_with_other_data(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    run, peak, ramp, floor = run_file(True), 3e-3, 2, 0.1
    both = ["--set", f"training.warmup_steps={ramp}", "--set", "deepspeed.mocte.check_every=0.34"]
    both += ["--set", "deepspeed.bf16.enabled=false"]
    short = ["--set", "training.steps=6", *both]
    code, output = launch.pretrain(run, tmp_path / "out", *short)
    assert code == 0, output
    longer = ["--set", "training.steps=12", "--set", "training.seed=7", *both]
    code, output = launch.pretrain(run, tmp_path / "out", *longer)
    assert code == 2 and "training.seed: checkpoint 0, run 7" in output and "--allow-data-change" in output, output
    code, output = launch.pretrain(run, tmp_path / "out", *longer, "--allow-data-change")
    assert code == 0 and "training.seed: 0 before, 7 now" in output, output

    def cosine(step: int, steps: int) -> float:
        share = min(1.0, (step - 1 - ramp) / (steps - ramp))
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)

    rows = read_log(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, 13))
    expected = [cosine(step, 6 if step <= 6 else 12) for step in range(ramp + 2, 13)]
    assert [row["lr"] for row in rows[ramp + 1 :]] == pytest.approx(expected)
    told = read_log(tmp_path / "out", "events")
    # At shares .34, .68 and 1 of the budget: of 6 steps, and from step 6 on of 12. No experts emerge twice.
    assert [event["step"] for event in told if event["event"] == "check"] == [3, 5, 6, 9, 12]
    emerged = [event for event in told if event["event"] == "emergence"]
    assert sorted(event["block"] for event in emerged) == [0, 1] and max(event["step"] for event in emerged) <= 6
    events = {event["event"]: event for event in told}
    assert events["prolong"]["steps"] == [6, 12]
    assert events["prolong"]["lr"] == pytest.approx([cosine(7, 6), cosine(7, 12)])
    assert events["data_change"]["changes"]["training.seed"] == {"checkpoint": 0, "run": 7}


def test_data_that_changed_is_refused_before_a_run_begins(
    launch: Launcher, run_file: Write, prepared: Path, tmp_path: Path
) -> None:
    """Another id of the vocabulary, which nothing but the checksums shows."""
    for name in ("letters_train.bin", "numbers_validation.bin"):
        data, out = tmp_path / name / "data", tmp_path / name / "out"
        shutil.copytree(prepared, data)
        content = bytearray((data / name).read_bytes())
        content[100] ^= 1
        (data / name).write_bytes(content)
        code, output = launch.pretrain(run_file(False), out, "--set", f"data.prepared={data}")
        assert code == 2 and name in output, output
        assert not (out / "run.json").exists() and not (out / "checkpoints").exists()


def test_masked_documents_are_a_setting_of_the_run(launch: Launcher, run_file: Write, tmp_path: Path) -> None:
    short = ["--set", "training.steps=2", "--set", "training.warmup_steps=1"]
    for mask in ("false", "true"):
        code, output = launch.pretrain(run_file(True), tmp_path / mask, "--set", f"data.document_mask={mask}", *short)
        assert code == 0, output
    crossing, masked = (read_log(tmp_path / mask) for mask in ("false", "true"))
    assert abs(crossing[0]["loss"] - masked[0]["loss"]) > 1e-5, "the same weights and data, another attention"
    assert crossing[-1]["validation"] != masked[-1]["validation"]
    more = ["--set", "training.steps=3", *short[2:]]
    code, output = launch.pretrain(run_file(True), tmp_path / "true", "--set", "data.document_mask=false", *more)
    assert code == 2 and "document_mask" in output, output
