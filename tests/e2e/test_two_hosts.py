"""Two hosts with ssh between them, where this machine can make them: tests/e2e/two_hosts.sh."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.test_scripts import bash


@pytest.mark.usefixtures("deepspeed_op")
def test_two_hosts(run_file: Callable[[bool], Path], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    try:
        code, output = bash("tests/e2e/two_hosts.sh", run_file(True), tmp_path / "work", timeout=900)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"no end within 900 s:\n{error.output}")
    if code == 77:
        pytest.skip(output.strip().splitlines()[-1])
    assert code == 0, output
    assert output.count("ok: ") == 6, output
