"""The look at hosts before a run, through launch/pretrain.py."""

from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import Launcher


def test_alone_it_leaves_no_run_and_too_large_a_model_is_refused(
    launch: Launcher, run_file: Callable[[bool], Path], tmp_path: Path
) -> None:
    out, run = tmp_path / "out", run_file(True)
    code, output = launch.pretrain(run, out, "--preflight-only")
    assert code == 0 and "preflight: 2 ranks on 1 host, " in output, output
    assert not (out / "metrics.jsonl").exists() and not (out / "checkpoints").exists()
    # Four million hidden units: terabytes in fp32, of which nothing may be allocated.
    large = ("--set", "model.hidden_size=16384", "--set", "model.intermediate_size=4194304")
    code, output = launch.pretrain(run, out, *large)
    assert code == 2 and "the hosts are not ready; nothing was started:" in output and "Traceback" not in output, output
    assert "GB of memory are available, and its 2 ranks want" in output and "GB are free in the run's folder" in output
