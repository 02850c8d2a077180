"""Several experts per token: outputs, gradients, counts and the loss for even loads against sums over all experts."""

from typing import Any

import pytest
import torch
from torch import nn

from mocte_ds.config import MocteConfig
from mocte_ds.controller.route_observer import RouteObserver
from mocte_ds.controller.samples import Samples
from mocte_ds.dist.mesh import ALONE
from mocte_ds.errors import ConfigError
from mocte_ds.moe import Block, BlockMode, attach

D, E, T = 16, 4, 30


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(torch.tanh(self.c_fc(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FFN()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def emerged(**router: Any) -> tuple[Model, Block]:
    """A block whose experts, gate and residual are all random."""
    settings = {"kind": "random", "weight": "softmax", "learn": True, **router}
    config = MocteConfig.from_dict({"modules": "mlp", "num_experts": E, "router": settings})
    torch.manual_seed(0)
    model = Model()
    (block,) = attach(model, config)
    bank = block.banks[0]
    bank.gate.key.set(torch.randn(E, D), torch.randn(E))
    if bank.gate.router.weight == "sigmoid":
        bank.gate.cluster_correction.copy_(torch.randn(E))
    for parameter in bank.parameters():
        nn.init.normal_(parameter.requires_grad_(True), std=0.4)
    block.mode = BlockMode.SPECIALISING
    return model, block


@pytest.mark.parametrize("weighing", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_outputs_and_gradients(top_k: int, normalise: bool, weighing: str) -> None:
    if normalise and top_k == 1:
        return  # the weight is 1, or the scale
    scale = 2.5 if weighing == "sigmoid" else 1.0
    model, block = emerged(top_k=top_k, normalise=normalise, weight=weighing, scale=scale)
    bank, features = block.banks[0], torch.randn(2, T // 2, D, requires_grad=True)
    gate, parameters = bank.gate, list(bank.parameters())
    share = bank.loads.share = torch.rand(E)
    samples = Samples(MocteConfig(modules="mlp", num_experts=E), [block], ALONE)
    block.context.announce(domain=torch.tensor([0, 1]), sources=2, observer=samples)
    output = model(features)
    auxiliary = block.auxiliary_loss()
    found = torch.autograd.grad(output.square().sum() + auxiliary, [features, *parameters])

    rows = features.reshape(T, D)
    logits = rows @ (gate.key.cluster_weight + gate.cluster_residual).T + gate.key.cluster_bias
    scores = logits.softmax(-1) if weighing == "softmax" else 1 / (1 + (-logits).exp())
    order = scores.detach() + (gate.cluster_correction if weighing == "sigmoid" else 0)
    # By the k-th largest, not by torch.topk.
    chosen = order >= order.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
    weight = scores * chosen
    if normalise:
        weight = weight / weight.sum(-1, keepdim=True)
    weight, probability = weight * scale, scores / scores.sum(-1, keepdim=True)
    every = torch.stack([expert(rows) for expert in bank.local_experts], dim=1)
    expected = (weight[..., None] * every).sum(1).view_as(features)
    even = 0.01 * E * (share * probability.mean(0)).sum()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(auxiliary, even)
    wanted = torch.autograd.grad(expected.square().sum() + even, [features, *parameters], allow_unused=True)
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    total = bank.loads.total
    assert torch.equal(total, chosen.sum(0)) and int(total.sum()) == T * top_k
    by_source = torch.stack([part.sum(0) for part in chosen.view(2, T // 2, E)])
    assert torch.equal(samples.by_source[bank.deepspeed_moe], by_source)


def test_what_is_recorded_is_the_best_expert() -> None:
    model, block = emerged(top_k=2)
    features = torch.randn(2, T // 2, D)
    look = RouteObserver(torch.stack([torch.arange(T), 7 * torch.arange(T)], -1).view(2, -1, 2))
    with block.context.watched_by(look):
        model.eval()(features)
    layer, gate = block.banks[0].deepspeed_moe, block.banks[0].gate
    weight, bias = gate.linear()
    order = (features.reshape(T, D) @ weight.T + bias).argsort(dim=-1, descending=True)
    assert torch.equal(look.routes[layer], order[:, 0])
    for k, (rows,) in look.rows[layer].items():
        assert sorted(rows[:, 0].tolist()) == (order[:, :2] == k).any(1).nonzero()[:, 0].tolist()
        assert torch.equal(rows[:, 1], 7 * rows[:, 0])


@pytest.mark.parametrize(
    ("router", "told"),
    [
        ({"top_k": 2}, "top_k = 2 needs weight 'softmax'"),
        ({"top_k": 5, "weight": "softmax"}, "top_k = 5 must lie between 1 and mocte.num_experts = 4"),
        ({"top_k": 0}, "top_k = 0"),
        ({"weight": "softmax", "normalise": True}, "normalise is for top_k > 1"),
        ({"weight": "sigmoid"}, "'sigmoid' is for kind 'random' .* not for 'token'"),
        ({"kind": "random", "weight": "softmax", "scale": 2.0}, "scale = 2.0 must be positive, and 1 without"),
    ],
)
def test_settings_that_are_refused(router: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MocteConfig.from_dict({"modules": "mlp", "num_experts": E, "router": {"kind": "token", **router}})
