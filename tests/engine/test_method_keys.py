"""Keys that may make clusters pay, in runs: the same for every ep_size, resumed bitwise, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import runs
from tests.spawn import spawn

STEPS, HALF = 14, 9
LEARNED = {"learn": True, "rate": 0.3, "aux": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "pair": {"router": {"kind": "pair", "rows": 512}},
    "a learned prior over groups": {
        "num_experts": 6,
        "expert": {"kind": "lora", "width": 4},
        "router": {
            "kind": "type",
            "weight": "sigmoid",
            "balance_rate": 0.01,
            "top_k": 2,
            "normalise": True,
            "scale": 2.0,
            "std": 0.02,
            "groups": 3,
            "prior": 1.0,
            "learn_prior": True,
            **LEARNED,
        },
    },
    "online": {"router": {"kind": "online", "directions": 8, "balance_rate": 0.05}},
    "a gain": {"router": {"kind": "pair", "weight": "gain", **LEARNED}},
}


def settings(name: str, **changes: Any) -> dict[str, Any]:
    early = {"deadline": 0.1, "not_before": 0.0}
    values = runs.config(clusters=early, check_every=0.1, total_steps=20, conflict_every=0, **CASES[name], **changes)
    values["bf16"] = {"enabled": False}
    return values


def several(name: str, folder: str) -> dict[str, Any]:
    import mocte_ds

    found = {f"ep {size}": runs.run(settings(name, ep_size=size), 0, STEPS, None, None) for size in (1, 2)}
    found["first"] = runs.run(settings(name, ep_size=2), 0, HALF, None, folder)
    found["second"] = runs.run(settings(name, ep_size=2), HALF, STEPS, folder, None)
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings(name, ep_size=2))
    engine.load_checkpoint(folder)
    gate = engine.mocte.blocks[0].block.banks[0].gate
    found["gate"] = {key: value.clone() for key, value in gate.state_dict().items()}
    for key, value in found["first"]["gates"][0].items():
        assert torch.equal(found["gate"][key], value), f"{key} is saved and loaded"
    found["export"] = engine.mocte.export(Path(folder) / "exported")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run(name: str, tmp_path: Path) -> None:
    results = spawn(several, 2, name, str(tmp_path / "run"), timeout=240, deepspeed=True)
    for found in results:
        one, two, first, second = found["ep 1"], found["ep 2"], found["first"], found["second"]
        torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(two["losses"]), rtol=1e-5, atol=1e-6)
        assert [*first["losses"], *second["losses"]] == two["losses"], "resumed bitwise"
        assert one["load"] == two["load"]
        assert found["export"]["architecture"] == "MocteBlocksForCausalLM"
        if name == "online":
            # Since birth centroids have left length one.
            assert not torch.allclose(found["gate"]["key.cluster_centroids"].norm(dim=1), torch.ones(4), atol=1e-4)
        if "prior" in name:
            assert 0.5 < found["gate"]["cluster_prior"].item() < 1.5 and found["gate"]["cluster_prior"] != 1.0
    born = [event for event in results[0]["ep 1"]["events"] if event["event"] == "emergence"]
    assert len(born) == 2 and all(event["step"] < HALF for event in born)
    assert all(event["output_change"] < 1e-5 for event in born), "the function is kept"
    for run in ("ep 1", "ep 2", "second"):
        for mine, other in zip(results[0][run]["gates"], results[1][run]["gates"], strict=True):
            for key, value in mine.items():
                assert torch.equal(value, other[key]), f"{key} of a run that trains is the same on all ranks"
