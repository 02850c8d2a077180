"""examples/by_chance.py freezes as many experts of each bank as another run did, at the same checks."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mocte_ds.config import FreezeConfig
from mocte_ds.trainability import Probe
from mocte_ds.trainability.policy import Policy
from mocte_ds.user_files import import_files

EXAMPLE = Path(__file__).parents[2] / "examples" / "by_chance.py"
STEPS, EXPERTS, BANKS = range(10, 110, 10), 8, 2
FROZEN = {(0, 1): 60, (0, 2): 60, (0, 6): 80, (1, 0): 70}  # (block, expert): measured at


def events() -> list[dict]:
    lines = []
    for step in STEPS:
        blocks = [{"block": b, "experts": [{}] * EXPERTS, "imbalance": [1.0] * BANKS} for b in range(2)]
        lines.append({"event": "check", "step": step + 1, "measured_at": step, "blocks": blocks})
        for (block, expert), when in FROZEN.items():
            if when == step:
                lines.append({"event": "freeze", "step": step + 1, "block": block, "expert": expert})
    return lines


def test_same_times_other_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in events()))
    monkeypatch.setenv("FREEZES_OF", str(path))
    import_files([EXAMPLE])
    chosen = []
    for seed in range(8):
        policy = Policy(FreezeConfig(policy="by-chance", rows=32, after_checks=3), seed)
        found = {}
        for who in [(block, expert) for block in range(2) for expert in range(EXPERTS)]:
            history: list[Probe] = []
            for step in STEPS:
                history.append(Probe(step, step / 200, 1.0, 32, 0.0))
                decision = policy.decide(history, 0.02, [1.0], who, frozen=False)
                if decision.action == "freeze":
                    found[who] = step
                    break
        by_bank = Counter((block, expert // 4, step) for (block, expert), step in found.items())
        assert by_bank == Counter((block, expert // 4, step) for (block, expert), step in FROZEN.items())
        chosen.append(tuple(sorted(found)))
    assert len(set(chosen)) > 3, "another seed chooses others"
