"""Conflict between domains in a checkpoint's FFNs, against backward passes over each domain's text alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mocte_ds.evaluation import conflicts
from mocte_ds.evaluation.conflicts import Sums, conflicts_text, directions, read_conflicts
from mocte_ds.evaluation.features import Reader

SEQUENCES, DOMAINS = 16, (0, 1)


def test_cosines_are_those_of_the_weights_gradients(
    network: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "LEAST", 8)
    monkeypatch.setattr(conflicts, "ROWS", 100)
    found = read_conflicts("checkpoint", prepared, SEQUENCES)
    reader = Reader("checkpoint", prepared, SEQUENCES)
    (batch,) = reader.batches()
    assert [fact["module"] for fact in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    compared = 0
    for fact in found:
        weights = list(network.get_submodule(fact["module"]).parameters())
        means, squares = [], []
        for domain in DOMAINS:
            mine = (batch["domain"] == domain).nonzero()[:, 0]
            halves = [gradient(network, weights, batch, mine[half::2]) for half in (0, 1)]
            squares.append(float(halves[0] @ halves[1]))
            means.append(gradient(network, weights, batch, mine))
        product, plain = float(means[0] @ means[1]), float(np.mean([float(m @ m) for m in means]))
        assert fact["tokens"] == SEQUENCES * reader.context
        if np.mean(squares) > 0:
            assert fact["cosine"] == pytest.approx(product / np.mean(squares), rel=1e-3)
            assert fact["noise"] == pytest.approx(1 - np.mean(squares) / plain, rel=1e-3)
            assert fact["negative"] == (product < 0)
            compared += 1
        assert 1 / 100 <= fact["kappa"] <= 1 and fact["Q"] is not None
    assert compared, "in no module there is more than noise"
    assert conflicts_text(found).splitlines()[1].split()[:2] == ["model.layers.0.mlp", "-"]


def test_too_few_rows_say_nothing(network: Any, prepared: Path) -> None:
    for fact in read_conflicts("checkpoint", prepared, 4):
        assert fact["kappa"] is None and fact["cosine"] is None and fact["noise"] is None


def test_noise_adds_nothing_to_a_cosine() -> None:
    """Two directions at 60 degrees in each of many experts, under noise that is ten times as long."""
    random = np.random.default_rng(0)
    true = np.zeros((2, 4000))
    true[0, 0], true[1, 0], true[1, 1] = 1.0, 0.5, np.sqrt(0.75)
    noisy = true[:, None] + 10 / np.sqrt(4000) * random.standard_normal((1000, 2, 2, 4000))
    tokens = torch.full((2, 2), 100.0)
    found = directions([Sums(torch.from_numpy(100 * one).float(), tokens) for one in noisy])
    assert found["cosine"] == pytest.approx(0.5, abs=0.1)
    assert found["noise"] == pytest.approx(50 / 51, abs=0.01)  # two halves of 100 each, beside 1
    assert found["negative"] < 0.5


def gradient(network: Any, weights: list[Any], batch: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of some sequences of the loss's gradient by one FFN's weights."""
    labels = batch["labels"][chosen].flatten()
    logits = network(input_ids=batch["input_ids"][chosen]).logits.flatten(0, 1)
    found = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), weights)
    return torch.cat([part.flatten() for part in found]) / len(labels)
