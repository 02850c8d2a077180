"""Validation: each domain's loss over all its sequences, however they are shared out."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.training.model import Forward, TransformersModel, make_model
from mocte_ds.training.validation import Validation
from tests.spawn import spawn

CONFIG = TransformersModel(
    hf={
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
)


def batches() -> dict:
    generator = torch.Generator().manual_seed(3)
    result = {}
    for domain, count in {"b": 5, "a": 2, "c": 4}.items():
        ids = torch.randint(40, (count, 13), generator=generator)
        labels = ids[:, 1:].clone()
        labels[0, :4] = -100
        result[domain] = (ids[:, :-1], labels)
    return result


class _Engine:
    """What DeepSpeed's engine does: its own `training` stays True, eval() and train() set the module's."""

    def __init__(self, model: nn.Module) -> None:
        self.module, self.device, self.training, self.modes = model, "cpu", True, []

    def __call__(self, **inputs: Any) -> Any:
        self.modes.append(self.module.training)
        return self.module(**inputs)

    def eval(self) -> None:
        self.module.eval()

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)


def losses_on_a_rank(micro_batch: int) -> dict:
    torch.manual_seed(7)
    engine = _Engine(make_model(CONFIG))
    for mode in (False, True):
        engine.train(mode)
        validation = Validation(batches(), micro_batch, Forward(engine.module, None), mesh_of_processes().data)
        found = validation.losses(engine)
        assert engine.module.training is mode and not any(engine.modes)
    return found


def expected() -> dict:
    torch.manual_seed(7)
    model, means = make_model(CONFIG), {}
    for domain, (ids, labels) in batches().items():
        with torch.no_grad():
            means[domain] = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    return {**means, "mean": sum(means.values()) / 3}


@pytest.mark.parametrize("micro_batch", [1, 4, 16])
def test_one_process(micro_batch: int) -> None:
    assert losses_on_a_rank(micro_batch) == pytest.approx(expected(), rel=1e-5)


def test_three_ranks() -> None:
    for found in spawn(losses_on_a_rank, 3, 2, timeout=90):
        assert found == pytest.approx(expected(), rel=1e-5)
