"""launch/pretrain.py skips steps that are not finite, saves between them, and goes back after too many in a row."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mocte_ds.report.reader import read_run
from mocte_ds.report.run_table import run_text
from tests.e2e.conftest import Launcher, read_log
from tests.e2e.test_pretrain import what_is_learned

BATCH = 16
ONE, MANY = 3, (8, 9, 10)
"""Numbers of the bad batches: one by itself, and three in a row."""
# One sequence of the batch is bad, that of one rank; a signal comes while the first of many is read.
POISON = """
import math, os, pathlib, signal
from mocte_ds.data.loader import BlendedLoader
from mocte_ds.training import loop

BAD, STOP, STOPPED, READ = set({bad}), {stop}, pathlib.Path({stopped!r}), []
sequence, loss = BlendedLoader.sequence, loop.Forward.loss


def noted(self, number):
    READ.append(number)
    return sequence(self, number)


def spoiled(self, output, labels):
    read, value = set(READ), loss(self, output, labels)
    READ.clear()
    if STOP in read and not STOPPED.exists():
        STOPPED.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return value * math.nan if read & BAD else value


BlendedLoader.sequence, loop.Forward.loss = noted, spoiled
"""
WITHOUT = """
from mocte_ds.data.loader import BlendedLoader

init = BlendedLoader.__init__


def without(self, *args, left_out=(), **more):
    init(self, *args, left_out={gone}, **more)


BlendedLoader.__init__ = without
"""


def learned(folder: Path) -> list[dict]:
    """The log without clocks, and without what it says of skipped steps."""
    return [{key: value for key, value in row.items() if key != "skipped_steps"} for row in what_is_learned(folder)]


@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
def test_skipped_saved_and_left_out(
    launch: Launcher, run_file: Callable[[bool], Path], tmp_path: Path, blocks: bool
) -> None:
    run, out, expected = run_file(blocks), tmp_path / "out", tmp_path / "expected"
    poison, without = tmp_path / "poison.py", tmp_path / "without.py"
    bad = [number * BATCH + 5 for number in (ONE, *MANY)]
    stopped = str(tmp_path / "stopped")
    poison.write_text(POISON.format(bad=bad, stop=bad[1], stopped=stopped), encoding="utf-8")
    gone = [number * BATCH for number in (ONE, *MANY)]
    without.write_text(WITHOUT.format(gone=gone), encoding="utf-8")
    watch = ["--set", "watch.skip_nonfinite=2", "--set", "watch.leave_out=3", "--import", poison]
    watch += ["--set", "watch.prometheus=true"]
    code, output = launch.pretrain(run, expected, "--import", without)
    assert code == 0, output

    code, output = launch.pretrain(run, out, *watch, "--profile", "4-10")
    assert code == 0 and "stopped at step 7" in output, output
    first = f"sequences {ONE * BATCH} to {ONE * BATCH + BATCH - 1}"
    assert "step 4 was skipped: the loss on rank 1" in output and first in output, output
    assert (out / "checkpoints" / "latest").read_text(encoding="utf-8") == "step7"
    profile, stop = [event for event in read_log(out, "events") if event["event"] in ("profile", "stop")]
    assert profile["event"] == "profile" and stop["event"] == "stop" and read_log(out, "events")[-1] == stop
    assert profile["steps"] == 5 and (out / "profile" / "rank-1.json.gz").is_file(), "step 8 was begun and skipped"
    assert 'mocte_step{run="out"} 7.0' in (out / "metrics.prom").read_text(encoding="utf-8")

    code, output = launch.pretrain(run, out, *watch)
    assert code == 1 and "Traceback" not in output, output
    said = "is not finite in step 8, after 2 skipped in a row (watch.skip_nonfinite; sequences 128 to 143, 144 to 159)"
    assert said in output, output
    assert "leaves these sequences out (3 of 3 batches" in output, output
    assert json.loads((out / "left_out.json").read_bytes())["batches"] == gone[1:]

    code, output = launch.pretrain(run, out, *watch)
    assert code == 0 and "done at step 20" in output, output
    assert len(learned(out)) == 20 and learned(out) == learned(expected)
    skipped = [event for event in read_log(out, "events") if event["event"] == "skipped_step"]
    assert [(event["step"], event["in_a_row"]) for event in skipped] == [(4, 1), (8, 1)]
    assert [event["sequences"][0] for event in skipped] == gone[:2]
    assert [row.get("skipped_steps") for row in read_log(out)] == [None] * 3 + [1] * 4 + [2] * 13
    assert "skipped_step" in run_text(read_run(out))
