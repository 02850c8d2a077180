"""A run file names a routing key of the user's own: training, resume and the tools read its file by --import."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import LIMIT, ROOT, Launcher, read_log

KEY = '''
from torch import Tensor
from mocte_ds.moe.keys import KEYS, Key


@KEYS.register("remainder")
class Remainder(Key):
    """The id modulo the number of experts."""

    reads_ids, has_logits, of_sample = True, False, False

    def fit(self, birth) -> None:
        """Nothing is learned from the clusters."""

    def choose(self, features: Tensor, tokens) -> Tensor:
        """(n,) expert of each token."""
        return (tokens.ids % self.num_experts).reshape(-1)
'''


def tool(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def test_a_run_and_the_tools(launch: Launcher, run_file: Callable[[bool], Path], tmp_path: Path) -> None:
    key, out, run = tmp_path / "remainder.py", tmp_path / "run", run_file(True)
    key.write_text(KEY, encoding="utf-8")
    changes = ["deepspeed.mocte.router={kind: remainder}", "deepspeed.mocte.clusters={not_before: 0, deadline: 0.1}"]
    options = [word for change in (*changes, "training.steps=6") for word in ("--set", change)]
    code, output = launch.pretrain(run, out, *options)
    assert code != 0 and "--import FILE" in output
    for more in (("--stop-after", 3), ()):
        code, output = launch.pretrain(run, out, *options, "--import", key, *more)
        assert code == 0, output
    assert [row["step"] for row in read_log(out)] == list(range(1, 7))
    assert "emergence" in {event["event"] for event in read_log(out, "events")}
    for name in ("inspect_checkpoint", "reshape"):  # they run no key
        given = {"reshape": (tmp_path / "one", "--world-size", 1)}.get(name, ())
        done = tool(name, out / "checkpoints", *given)
        assert done.returncode == 0, done.stderr
    calls = {
        "zero_to_fp32": (out / "checkpoints", tmp_path / "fp32"),
        "export_hf": (out / "checkpoints", tmp_path / "export"),
        "plan": ("--run", run, "--gpus", 2, *options),
    }
    for name, given in calls.items():
        without, done = tool(name, *given), tool(name, *given, "--import", key)
        assert without.returncode != 0 and "--import FILE" in without.stderr, name
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "export" / "user_key_remainder_mocte.py").is_file()
