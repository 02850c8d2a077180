"""A kill at any moment blocks nothing and loses nothing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_kill_at_any_moment_blocks_nothing_and_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ownership.killed", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [], "every folder was removed at last"
