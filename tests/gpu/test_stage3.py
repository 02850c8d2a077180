"""ZeRO stage 3 on a CUDA device: it moves the model there by itself, and trains as stage 2 does."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import runs
from tests.spawn import spawn

pytestmark = pytest.mark.gpu


def train(stage: int, offload: bool, folder: Path | None) -> dict[str, Any]:
    """A run with checks on one device, its weights' devices, and its checkpoint after the 12th of 20 steps."""
    import mocte_ds

    freeze = {"policy": "random", "checks": 1, "after_checks": 2, "rows": 32, "iterations": 4}
    settings = runs.config(ep_size=1, freeze=freeze, clusters={"deadline": 0.1, "not_before": 0.05})
    settings.update(gradient_accumulation_steps=1, gradient_clipping=0.0)
    settings["zero_optimization"]["stage"] = stage
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        del settings["optimizer"]["params"]["torch_adam"]  # DeepSpeed's AdamW for CPUs
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    events: list[dict[str, Any]] = []
    engine.mocte.on_event(events.append)
    first = 0
    if folder is not None and (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
        first = engine.global_steps
    losses = []
    for step in range(first, 20):
        ids = runs.batch(step, 0)[0].to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if folder is not None and first == 0 and step == 11:
            engine.save_checkpoint(str(folder))
    held = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()] + list(engine.module.buffers())
    kinds = {event["event"] for event in events}
    devices = {tensor.device.type for tensor in held}
    engine.destroy()
    return {"losses": losses, "devices": devices, "kinds": kinds}


def both_stages(offload: bool, folder: str) -> list[dict[str, Any]]:
    """Stage 3, stage 2, and stage 3 again from its checkpoint."""
    return [train(3, offload, Path(folder)), train(2, offload, None), train(3, offload, Path(folder))]


@pytest.mark.parametrize("offload", [False, True])
def test_stage_3_is_stage_2(tmp_path: Path, offload: bool) -> None:
    ((found, expected, resumed),) = spawn(
        both_stages, 1, offload, str(tmp_path), timeout=200, deepspeed=True, device="cuda"
    )
    assert found["devices"] == {"cuda"}
    assert {"emergence", "freeze"} <= found["kinds"] == expected["kinds"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert resumed["losses"] == pytest.approx(found["losses"][12:], rel=1e-3)
