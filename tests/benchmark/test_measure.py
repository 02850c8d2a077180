"""What benchmarks share: clocks, memory, run plans; and the command line around them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mocte_ds.benchmark import benchmarks
from mocte_ds.benchmark.measure import clock as clock_module
from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.memory import available_bytes, require_memory
from mocte_ds.benchmark.measure.run_plan import read_plan, sampling_window
from mocte_ds.config import MocteConfig
from mocte_ds.controller.checks import Checks
from mocte_ds.errors import MocteError
from tests.benchmark.conftest import RUN
from tools.benchmark import main

ROOT = Path(__file__).resolve().parents[2]


def test_short_work_is_repeated_and_long_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock("cpu"), []
    times = iter([0.0, 9.0, 10.0, 11.0, 20.0, 25.0, 30.0, 33.0])
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(clock_module, "_LONG", 9.5)
    assert clock.seconds(lambda: calls.append(1) or len(calls), repeats=3) == (1.0, 4)
    times = iter([0.0, 10.0])
    assert clock.seconds(lambda: "result", repeats=3) == (10.0, "result")


def test_rates_are_finite() -> None:
    machine = Clock("cpu").machine(gemm_size=32)
    assert machine["threads"] == torch.get_num_threads() and machine["device"]
    assert all(0 < rate < 1e16 for rate in machine["gemm_flops_per_second"].values())
    assert 0 < machine["copy_bytes_per_second"] < 1e14


def test_memory_that_is_not_there_is_refused() -> None:
    device = torch.device("cpu")
    there = available_bytes(device)
    assert 0 < there < 1e15
    with pytest.raises(MocteError, match=r"it needs about 1000000.0 GB on cpu, and .* GB are free. Take less."):
        require_memory(1e15, device, "it", "Take less.")
    assert require_memory(1000.0, device, "it", "")["estimated_bytes"] == 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(MocteError, match="--device cuda: torch sees no CUDA device"):
        main(["trainability", "--device", "cuda"])


def test_plan_of_the_large_run() -> None:
    plan = read_plan("llama-7b", 64)
    assert (plan.blocks, plan.interval, plan.window, plan.dtype) == (32, 2136, 32, "bf16")
    assert plan.local_experts == 32 and plan.tokens_per_step == 524288
    # Six FLOPs per parameter and token, and attention: 12 T d per layer.
    dense = 6 * plan.model.num_params() * plan.tokens_per_step
    attention = 12 * 4096 * 4096 * 32 * plan.tokens_per_step
    # Layers run again in the backward pass, but for the FFN's last matrix; embeddings and output do not.
    matrices = plan.model.num_params() - 2 * plan.model.vocab_size * 4096 - 32 * 4096 * 11008
    again = (2 * matrices + 4 * 4096 * 4096 * 32) * plan.tokens_per_step
    assert plan.step_flops == pytest.approx(dense + attention + again, rel=0.02)


def test_plan_of_one_process(run_file: Path) -> None:
    plan = read_plan(run_file, 1)
    assert (plan.blocks, plan.interval, plan.window, plan.local_experts) == (2, 5, 5, 8)
    assert read_plan(run_file, 4).local_experts == 4


@pytest.mark.parametrize(
    ("steps", "rows", "documents", "sequences"), [(7, 64, 48, 8), (900, 64, 48, 8), (900, 9000, 16, 3)]
)
def test_sampling_window_is_the_controllers(steps: int, rows: int, documents: int, sequences: int) -> None:
    config = MocteConfig.from_dict({"modules": "x", "spectrum": {"rows": rows, "documents": documents}})
    checks = Checks(SimpleNamespace(config=config, total_steps=1), None, None, None, None, None)
    checks.interval = steps
    checks.set_window(sequences)
    assert sampling_window(config, steps, sequences) == checks.window


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        (("batch_tokens: 256", "batch_tokens: 256"), 3, "256 tokens cannot be cut for 3 ranks of 2 sequences of 32"),
        (("batch_tokens: 256", "batch_tokens: 256"), 0, "for 0 ranks"),
        (("  mocte:", "  tensorboard:"), 1, 'has no "mocte" block'),
        (("steps: 100", "step: 100"), 1, "Did you mean 'steps'"),
    ],
)
def test_runs_that_cannot_be_planned(tmp_path: Path, change: tuple[str, str], ranks: int, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace(*change), encoding="utf-8")
    with pytest.raises(MocteError, match=message):
        read_plan(path, ranks)


def test_a_run_file_that_is_not_there() -> None:
    with pytest.raises(MocteError, match=r"no file nothing.*llama-7b, .*quickstart"):
        read_plan("nothing", 1)


def test_every_benchmark_says_what_it_measures() -> None:
    assert {"spectrum", "trainability", "check"} <= set(benchmarks())
    assert all(benchmarks().values())


def test_installed_command_prints_one_object(run_file: Path) -> None:
    """Outside of the repository, and without the variable that keeps DeepSpeed from writing to stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    sizes = ["--d", "16", "--width", "24", "--rows", "8", "--experts", "1", "--iterations", "2", "--gemm-size", "32"]
    runs = ["--small", str(run_file), "--large", str(run_file), "--ranks", "2"]
    program = Path(sys.executable).parent / "mocte-ds"
    done = _run([program, "benchmark", "trainability", *sizes, *runs, "--device", "cpu", "--json"], environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["benchmark"] == "trainability"
    assert "trainability 1/1" in done.stderr, "the progress bar"


def test_errors_of_the_command_line() -> None:
    program = [sys.executable, ROOT / "tools" / "benchmark.py"]
    done = _run([*program, "spectrum", "--layers", "100000", "--device", "cpu"], os.environ.copy())
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: a check of 100000 layers x 8192 rows")


def _run(command: list, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False)
