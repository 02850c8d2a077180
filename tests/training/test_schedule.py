"""The learning rate that a step really takes under DeepSpeed's scheduler is the one that we plan with."""

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from mocte_ds.training.schedule import learning_rate, warmup_cosine


@pytest.mark.parametrize(("total", "warmup", "ratio"), [(40, 5, 0.1), (100, 1, 0.0), (10, 9, 0.5)])
def test_against_deepspeed(total: int, warmup: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler = WarmupCosineLR(optimizer, **warmup_cosine(total, warmup, ratio)["params"])
    taken = []
    for _ in range(total):
        taken.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert taken == pytest.approx([learning_rate(step, 3.0, total, warmup, ratio) for step in range(1, total + 1)])


def test_shape() -> None:
    rates = [learning_rate(step, 1.0, 200, 20, 0.1) for step in range(1, 201)]
    peak = rates.index(max(rates))
    assert 19 <= peak <= 21 and max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[1] > 0, "only the first step may have the rate 0"
    assert all(a < b for a, b in zip(rates[:peak], rates[1 : peak + 1], strict=True))
    assert all(a > b for a, b in zip(rates[peak:-1], rates[peak + 1 :], strict=True))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
