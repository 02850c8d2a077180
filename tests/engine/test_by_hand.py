"""What a user did by hand, and what a model insists on, hold through the engine, its checks and its checkpoints."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine import runs
from tests.spawn import spawn


def frozen_by_hand(folder: str) -> dict[str, Any]:
    """Freeze an expert before its trainability is at its highest; what the checks do with it, also after a reload."""
    import mocte_ds

    # Every expert that has fallen low freezes, and every frozen one that was lower before thaws.
    freeze = {"policy": "trainability", "alpha": 0.999, "beta": 0.99, "checks": 1, "after_checks": 1, "rows": 16}
    settings = runs.config(ep_size=1, auto=True, check_every=0.05, freeze={**freeze, "iterations": 6})
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    events: list[dict[str, Any]] = []
    engine.mocte.on_event(events.append)
    held = None
    for step in range(runs.STEPS):
        if held is None and engine.mocte.blocks[0].mode.value == "specialising":
            engine.mocte.freeze(0, 1)
            held = step
        for turn in range(2):
            ids, _ = runs.batch(step, turn)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    engine.save_checkpoint(folder)
    other, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    other.load_checkpoint(folder)
    expert = other.mocte.blocks[0].experts[1]
    refused_twice = str(expert.mode), expert.held
    other.mocte.thaw(0, 1)
    return {
        "held": held,
        "checks": sum(event["event"] == "check" and event["step"] > held for event in events),
        "changes": [(event["event"], event["block"], event["expert"]) for event in events if "expert" in event],
        "loaded": refused_twice,
        "thawed": (str(expert.mode), expert.held),
    }


def test_an_expert_that_a_hand_froze_stays_frozen(tmp_path: Path) -> None:
    (found,) = spawn(frozen_by_hand, 1, str(tmp_path), timeout=120, deepspeed=True)
    assert found["held"] is not None and found["checks"] >= 8
    assert [change for change in found["changes"] if change[1:] == (0, 1)] == [("freeze", 0, 1)]
    assert ("thaw", 0) in {change[:2] for change in found["changes"]}, "others did thaw"
    assert found["loaded"] == ("frozen", True) and found["thawed"] == ("training", False)


class _NeedsLabels(nn.Module):
    """Has no logits to give: its forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = runs.model().model
        self.head = nn.Linear(32, runs.VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.body(input_ids=input_ids)[0])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def with_labels() -> list[dict[str, Any]]:
    import mocte_ds

    settings = runs.config(ep_size=1, modules="body.layers.*.mlp", freeze={"rows": 16, "iterations": 4})
    engine, *_ = mocte_ds.initialize(model=_NeedsLabels(), config=settings)
    events: list[dict[str, Any]] = []
    engine.mocte.on_event(events.append)
    for step in range(20):
        for turn in range(2):
            ids, _ = runs.batch(step, turn)
            engine.backward(engine(input_ids=ids, labels=ids))
            engine.step()
    return events


def test_a_model_that_needs_labels_is_checked_with_them() -> None:
    (events,) = spawn(with_labels, 1, timeout=60, deepspeed=True)
    tokens = [event["probe"]["tokens"] for event in events if event["event"] == "check"]
    assert len(tokens) >= 5 and all(tokens[-5:]) and max(tokens) > 0
