"""A rank killed at ten moments, in steps and in saves: the run goes on from a whole checkpoint to the same losses."""

import json
import os
import random
import re
from pathlib import Path

from pytest import raises

from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.place import resolve_tag
from mocte_ds.dist.processes import RanksFailed
from tests.checkpoints import kill
from tests.spawn import spawn


def moments(seed: int) -> list[kill.Moment]:
    """Every phase once, in any order, each later than the one before."""
    generator = random.Random(seed)
    phases = [*kill.IN_STEP, *kill.IN_SAVE]
    generator.shuffle(phases)
    found = []
    for number, phase in enumerate(phases):
        step = kill.EVERY * (number + 1)
        if phase in kill.IN_SAVE:
            only_zero = kill.IN_SAVE[phase][3]
            # Rank zero keeps its own hashes to itself.
            rank = 1 if phase == "hashes are told" else 0 if only_zero else generator.randrange(2)
        else:
            step, rank = step + generator.randrange(2), generator.randrange(2)
        found.append(kill.Moment(step, phase, rank))
    return found


def losses(folder: Path, rank: int) -> list[tuple[int, int, str]]:
    lines = (folder / f"losses_{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line)) for line in lines]


def test_killed_at_ten_moments(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    expected = spawn(kill.run, 2, str(undisturbed), None, False, False, timeout=90, deepspeed=True)
    steps = []
    for number, moment in enumerate(moments(int(os.environ.get("MOCTE_KILL_SEED", "11")))):
        with raises(RanksFailed, match=rf"rank {moment.rank} failed") as caught:
            # The launcher ends the other ranks.
            spawn(kill.run, 2, str(killed), moment, bool(number % 2), timeout=60, deepspeed=True, grace=0.2)
        assert re.search(rf"rank {moment.rank}, exit code -9", str(caught.value)), f"{moment}: {caught.value}"
        tag = resolve_tag(killed / "checkpoints") if (killed / "checkpoints").exists() else None
        steps.append(require_whole(killed / "checkpoints" / tag).step if tag else 0)
        assert moment.step - 2 * kill.EVERY <= steps[-1] <= moment.step, moment
    assert steps == sorted(steps) and len(steps) == 10
    assert spawn(kill.run, 2, str(killed), None, True, timeout=90, deepspeed=True) == expected
    for rank in range(2):
        whole, parts = losses(undisturbed, rank), losses(killed, rank)
        assert len(parts) > len(whole) == 2 * kill.STEPS, "killed runs repeat steps"
        assert set(parts) == set(whole)
    assert not list((killed / "checkpoints").glob(".*"))
    assert "frozen" in str(expected[0]["modes"])
