"""The scripts in examples/ run through the launcher, and resume."""

import re
from pathlib import Path

from tests.e2e.conftest import Launcher


def test_plain_loop(launch: Launcher, tmp_path: Path) -> None:
    code, output = launch("examples/plain_loop.py", "--out", tmp_path, "--steps", 60)
    assert code == 0, output
    assert len(re.findall(r"\d+ emergence ", output)) == 2, output
    code, output = launch("examples/plain_loop.py", "--out", tmp_path)
    assert code == 0 and not re.search(r"\d+ emergence ", output), output
    (loss,) = re.findall(r"step 80: loss (\d+\.\d\d)", output)
    assert "step 60" not in output and float(loss) < 4.0, "bytes without any learning cost ln 256 = 5.5"
    assert output.count("'training'") + output.count("'frozen'") == 8, output


def test_routing_key(launch: Launcher, tmp_path: Path) -> None:
    """The key is the script's own; a run goes on with it, and other scripts refuse it by name."""
    code, output = launch("examples/routing_key.py", "--out", tmp_path, "--steps", 60)
    assert code == 0 and len(re.findall(r"\d+ emergence ", output)) == 2, output
    code, output = launch("examples/routing_key.py", "--out", tmp_path)
    assert code == 0 and re.search(r"step 80: loss \d", output) and "step 60" not in output, output
    code, output = launch("examples/plain_loop.py", "--out", tmp_path)
    assert code != 0 and "kind-of-byte" in output, output
