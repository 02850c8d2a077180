"""Random "mocte" blocks that are accepted, really trained: changes by hand, a checkpoint, and the same next step."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import runs
from tests.spawn import spawn

KINDS = ("token", "online", "type", "pair", "prefix", "document", "previous", "hash", "pair-hash", "random")
POLICIES = ("trainability", "progress", "paper", "grad-norm", "inverted", "random", "off")
STEPS = 8


def router(rng: random.Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "kind": list(KINDS),
        "weight": ["hard", "softmax", "sigmoid", "gain"],
        "learn": [True, False],
        "top_k": [1, 1, 2],
        "normalise": [False, False, True],
        "unit_mean": [False, True],
        "balance_rate": [0.0, 0.01],
        "aux": [0.0, 0.01, 10.0],
        "bias": [True, False],
        "directions": [8, 40],
        "learn_prior": [False, True],
        "groups": [None, 2],
        "std": [None, 0.02],
        "centroid_rate": [0.0, 0.01],
    }
    return {key: rng.choice(values) for key, values in choices.items() if rng.random() < 0.5}


def block(rng: random.Random) -> dict[str, Any]:
    """Settings of a block that the config accepts."""
    from mocte_ds.config import MocteConfig
    from mocte_ds.errors import MocteError

    while True:
        clusters = {"deadline": rng.choice([0.0, 0.2, 1.0]), "not_before": rng.choice([0.0, 0.1])}
        values = {
            "modules": rng.choice(["model.layers.*.mlp", ["model.layers.1.mlp"]]),
            "num_experts": rng.choice([2, 4, 6]),
            "ep_size": rng.choice([1, 2]),
            "check_every": rng.choice([0.1, 0.25]),
            "apply_after": rng.choice([0, 1]),
            "conflict_every": rng.choice([0, 1]),
            "probe_tokens": rng.choice([0, 64]),
            "eod_id": rng.choice([None, 0]),
            "expert": rng.choice([{}, {"kind": "lora"}, {"kind": "lora", "width": 1}, {"redraw": 0.5}]),
            "spectrum": {"rank": rng.choice([1, 4, 200]), "rows": 128, "documents": rng.choice([16, 64])},
            "clusters": {**clusters, "method": rng.choice(["dbscan", "hdbscan"])},
            "freeze": {
                "policy": rng.choice(POLICIES),
                "checks": 1,
                "after_checks": 1,
                "rows": 16,
                "iterations": rng.choice([1, 4]),
                "prefix": rng.choice([{}, {"layers": 1, "start": 0.2, "end": 0.5}]),
            },
        }
        values |= {"banks": [router(rng), router(rng)]} if rng.random() < 0.25 else {"router": router(rng)}
        try:
            MocteConfig.from_dict({**values, "total_steps": STEPS}, 2)
            return values
        except MocteError:
            continue


def train_all(seed: int, count: int, folder: str) -> list[tuple[str, list[str], list[float]]]:
    rng = random.Random(seed)
    return [_train(block(rng), Path(folder) / str(number)) for number in range(count)]


def _train(values: dict[str, Any], folder: Path) -> tuple[str, list[str], list[float]]:
    import mocte_ds
    from mocte_ds.errors import MocteError

    settings = runs.config(**values)
    del settings["scheduler"]
    settings = {**settings, "gradient_accumulation_steps": 1}
    settings["mocte"]["total_steps"] = STEPS
    rank, said = torch.distributed.get_rank(), []

    def step(engine: Any, number: int) -> float:
        ids, domain = runs.batch(number, rank)
        engine.mocte.annotate(domain, ["low", "high"])
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    try:
        engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
        for number in range(STEPS - 2):
            step(engine, number)
    except MocteError as error:
        return f"refused: {error}", said, []
    for change, *where in (("emerge", 0), ("freeze", 0, 1), ("freeze", 0, 0), ("thaw", 0, 1)):
        try:
            getattr(engine.mocte, change)(*where)
            said.append(change)
        except MocteError as error:
            said.append(str(error))
    step(engine, STEPS - 2)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    losses = [step(engine, STEPS - 1)]
    engine.destroy()
    again, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    again.load_checkpoint(folder)
    losses.append(step(again, STEPS - 1))
    again.destroy()
    return "trained", said, losses


@pytest.mark.parametrize("seed", [1, 2])
def test_accepted_blocks_train_and_go_on_from_a_checkpoint(seed: int, tmp_path: Path) -> None:
    results = spawn(train_all, 2, seed, 4, str(tmp_path), timeout=240, deepspeed=True)
    for number, (mine, other) in enumerate(zip(*results, strict=True)):
        assert mine[:2] == other[:2], f"block {number}: the ranks do not agree"
        assert len(mine[2]) in (0, 2) and all(map(torch.isfinite, map(torch.tensor, mine[2]))), mine
        for losses in (mine[2], other[2]):
            assert losses[:1] == losses[1:], f"block {number}: {losses}"
    outcomes = [outcome for outcome, *_ in results[0]]
    assert outcomes.count("trained") >= 2, outcomes
