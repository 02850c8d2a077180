"""Mixtures from scratch: born before the first step, the same for every ep_size, resumed bitwise, exported."""

from pathlib import Path
from typing import Any

import torch

from tests.engine import runs
from tests.spawn import spawn

STEPS = 6
ROUTER = {"kind": "random", "weight": "sigmoid", "learn": True, "rate": 0.3, "unit_mean": True, "aux": 0.0}


def settings(**changes: Any) -> dict[str, Any]:
    values = runs.config(
        clusters={"deadline": 0, "not_before": 0},
        router={**ROUTER, "balance_rate": 0.01},
        expert={"redraw": 1.0},
        conflict_every=0,
        **changes,
    )
    values["bf16"] = {"enabled": False}
    return values


def several(folder: str) -> dict[str, Any]:
    import mocte_ds

    found = {f"ep {size}": runs.run(settings(ep_size=size), 0, STEPS, None, None) for size in (1, 2)}
    found["first"] = runs.run(settings(ep_size=2), 0, 3, None, folder)
    found["second"] = runs.run(settings(ep_size=2), 3, STEPS, folder, None)
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings(ep_size=2))
    engine.load_checkpoint(folder)
    gate = engine.mocte.blocks[0].block.banks[0].gate
    found["gate"] = {"mean": gate.cluster_mean.item(), "added": gate.cluster_correction.tolist()}
    found["export"] = engine.mocte.export(Path(folder) / "exported")
    return found


def test_it_is_born_at_step_zero_and_stays_the_same(tmp_path: Path) -> None:
    for found in spawn(several, 2, str(tmp_path / "run"), timeout=240, deepspeed=True):
        one, two, first, second = found["ep 1"], found["ep 2"], found["first"], found["second"]
        torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(two["losses"]), rtol=1e-5, atol=1e-6)
        assert [*first["losses"], *second["losses"]] == two["losses"], "resumed bitwise"
        assert one["load"] == two["load"]
        for event in (e for e in one["events"] if e["event"] == "emergence"):
            assert event["step"] == 0 and event["reason"].startswith("from scratch")
        assert one["modes"] == [["training"] * 4] * 2
        assert any(found["gate"]["added"]) and 0.3 < found["gate"]["mean"] < 0.8
        assert found["export"]["architecture"] == "MocteBlocksForCausalLM"
