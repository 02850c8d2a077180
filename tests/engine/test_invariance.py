"""The same global batches give the same run, whatever the ranks, expert-parallel groups and micro-batches."""

import contextlib
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mocte_ds.moe import bank
from tests.engine import runs
from tests.spawn import spawn

STEPS = 34
# Ranks, ep_size, sequences of a micro-batch, micro-batches of a step.
LAYOUTS = {
    1: [(1, 1, 8, 1), (1, 1, 2, 4)],
    2: [(2, 1, 4, 1), (2, 2, 4, 1), (2, 2, 2, 2)],
    4: [(4, 2, 2, 1)],
}
FREEZE = {"alpha": 0.97, "beta": 0.6, "checks": 1, "after_checks": 2, "rows": 32}
ROUTERS = {
    "hard": {"kind": "token"},
    "learned": {"kind": "token", "weight": "softmax", "learn": True, "aux": 0.1},
    "previous": {"kind": "previous"},
    "pair": {"kind": "pair"},
    "prefix": {"kind": "prefix"},
    "document": {"kind": "document"},
    "online": {"kind": "online", "directions": 8, "balance_rate": 0.05},
    "two banks": {},
    "two lora experts": {"kind": "token"},
}
MORE = {
    # By lambda none of its experts freezes within these steps.
    "pair": {"policy": "grad-norm"},
    "two banks": {"banks": [{"kind": "token"}, {"kind": "hash"}], "policy": "grad-norm"},
    # Centroids of two clusters of equal mass are equally far from the mean, and `lora` experts are drawn by number.
    "two lora experts": {"num_experts": 2, "expert": {"kind": "lora"}},
}
"""Other settings of the "mocte" block."""
PADDED = {"previous": 8, "pair": 8, "prefix": 8, "document": 8}
"""Padding per sequence, of routers that keep a state along it; on the left of every other sequence."""
LONE = (1, 1, 8, 1)
FEW_LAYOUTS = [LONE, (2, 2, 2, 2)]
RUNS = [
    (router, *layout)
    for router in ROUTERS
    for layouts in LAYOUTS.values()
    for layout in (
        layouts if router in ("hard", "learned") else [layout for layout in layouts if layout in FEW_LAYOUTS]
    )
]
COMPARED = [run for run in RUNS if run[1:] != LONE]


def settings(router: str, ep_size: int, micro: int, parts: int) -> dict[str, Any]:
    """DeepSpeed config in fp32 with automatic emergence and freezing."""
    more = dict(MORE.get(router, {}))
    block = {
        "ep_size": ep_size,
        "check_every": 0.125,  # so that a check sees enough documents to find clusters in
        "clusters": {"deadline": 0.6, "not_before": 0.05},
        "freeze": {**FREEZE, "iterations": 12, "policy": more.pop("policy", "trainability")},
        "conflict_every": 1,
        "router": ROUTERS[router],
    }
    config = runs.config(**block, **more)
    del config["bf16"]
    return {**config, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": parts}


def batch(router: str, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model is given in a step, the same number of labels in every sequence; and its domains."""
    ids, domain = runs.batch(step, 0)
    pad = PADDED.get(router, 0)
    if not pad:
        return {"input_ids": ids, "labels": ids}, domain
    mask = torch.ones_like(ids)
    mask[::2, :pad], mask[1::2, -pad:] = 0, 0
    labels = ids.where(mask.bool(), -100)
    labels[::2, pad] = -100  # would be predicted from padding
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}, domain


def train(ranks: int) -> dict[tuple, dict[str, Any]]:
    """Events and global losses of each run on that many ranks, one after the other."""
    found = {}
    for run in [run for run in RUNS if run[1] == ranks]:
        # However few rows there are, those of a rank's own experts stay there in one layout, and travel in the others.
        with patch.object(bank, "_MANY_ROWS", 0) if run[1:] == FEW_LAYOUTS[1] else contextlib.nullcontext():
            found[run] = _train(*run)
    return found


def _train(router: str, ranks: int, ep_size: int, micro: int, parts: int) -> dict[str, Any]:
    import mocte_ds

    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings(router, ep_size, micro, parts))
    rank, events, losses = torch.distributed.get_rank(), [], []
    engine.mocte.on_event(events.append)
    for step in range(STEPS):
        inputs, domain = batch(router, step)
        total = torch.zeros((), dtype=torch.float64)
        for part in range(parts):
            first = (part * ranks + rank) * micro
            mine = slice(first, first + micro)
            engine.mocte.annotate(domain[mine], ["low", "high"])
            loss = engine(**{name: value[mine] for name, value in inputs.items()}).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / (parts * ranks)
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    decided = [
        (event["event"], event["step"], event["block"], event.get("expert"), event["reason"].partition(",")[0])
        for event in events
        if event["event"] in ("emergence", "freeze", "thaw", "anneal")
    ]
    # By step and block: of the dense FFN and the experts together, and of each expert.
    conflicts = {
        (event["measured_at"], block["block"]): (
            block["conflict"],
            [expert["kappa"] or 0.0 for expert in block["experts"]],
        )
        for event in events
        if event["event"] == "check"
        for block in event["blocks"]
    }
    engine.destroy()
    return {"losses": losses, "decided": decided, "conflicts": conflicts}


@pytest.fixture(scope="module")
def results() -> dict[tuple, dict[str, Any]]:
    found: dict[tuple, dict[str, Any]] = {}
    for ranks in LAYOUTS:
        found.update(spawn(train, ranks, ranks, timeout=240, deepspeed=True)[0])
    return found


@pytest.mark.parametrize("run", COMPARED, ids=str)
def test_same_events_and_losses(results, run):
    expected, found = results[(run[0], *LONE)], results[run]
    kinds = [event[0] for event in expected["decided"]]
    assert kinds.count("emergence") == 2 and "freeze" in kinds, kinds
    reasons = {event[-1] for event in expected["decided"] if event[0] == "emergence"}
    assert reasons == {"detected: 2 clusters"}, reasons
    assert found["decided"] == expected["decided"]
    assert torch.tensor(found["losses"]).sub(torch.tensor(expected["losses"])).abs().max() < 1e-5


@pytest.mark.parametrize("run", COMPARED, ids=str)
def test_same_coherence_of_gradients(results, run):
    """The same rows, merged from all ranks: an average over an expert's replicas would be of fewer rows each."""
    expected, found = results[(run[0], *LONE)]["conflicts"], results[run]["conflicts"]
    measured = [kappas for _, kappas in expected.values()]
    experts = sum(len(kappas) for kappas in {block: kappas for (_, block), (_, kappas) in expected.items()}.values())
    assert sum(kappa > 0 for kappas in measured for kappa in kappas) >= 2 * experts >= 8
    assert any(not any(kappas) and numbers for numbers, kappas in expected.values()), "no dense FFN"
    assert found.keys() == expected.keys()
    for key, (numbers, kappas) in expected.items():
        assert found[key][1] == pytest.approx(kappas, rel=2e-3), key
        assert (numbers is None) == (found[key][0] is None)
        if numbers is not None:
            assert found[key][0]["rows"] == numbers["rows"] and numbers["rows"] % FREEZE["rows"] == 0
