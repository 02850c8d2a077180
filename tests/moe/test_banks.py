"""Banks of a block with weights, gates and numbers of experts per token of their own: against sums over all experts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe import bank as moe_bank
from tests.moe.test_top_k import FFN, D, E, T
from tests.spawn import spawn

BANKS = [
    {"kind": "token"},
    {"kind": "random", "weight": "softmax", "learn": True, "aux": 0.0, "top_k": 2},
    {"kind": "random", "weight": "sigmoid", "learn": True, "aux": 0.0},
]


def block_of_rank(rank: int, world: int) -> tuple[nn.Module, Block]:
    """A block whose weights are those of all ranks together: those of an expert follow from bank and number."""
    config = MocteConfig.from_dict({"modules": "0", "num_experts": E, "ep_size": world, "banks": BANKS}, world)
    torch.manual_seed(0)
    model = nn.Sequential(FFN())
    (block,) = attach(model, config)
    for b, bank in enumerate(block.banks):
        if world > 1:
            bank.set_deepspeed_parallelism(use_data_before_expert_parallel_=False)
        drawn = torch.Generator().manual_seed(b)
        bank.gate.key.set(torch.randn(E, D, generator=drawn), torch.randn(E, generator=drawn))
        for parameter in bank.gate.parameters():
            parameter.requires_grad_(True).data.normal_(std=0.4, generator=drawn)
        for local, expert in enumerate(bank.local_experts):
            drawn = torch.Generator().manual_seed(100 * b + bank.first_local(rank) + local)
            for parameter in expert.parameters():
                parameter.requires_grad_(True).data.normal_(std=0.4, generator=drawn)
    block.mode = BlockMode.SPECIALISING
    return model, block


def features_of(rank: int) -> Tensor:
    return torch.randn(2, T // 2 + rank, D, generator=torch.Generator().manual_seed(7 + rank))


def on_rank(many_rows: int) -> dict[str, Any]:
    """With so many rows of an expert tokens of a rank's own experts do not travel."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    moe_bank._MANY_ROWS = many_rows
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, block = block_of_rank(rank, world)
    features = features_of(rank).requires_grad_()
    output = model(features)
    output.square().sum().backward()
    return {
        "output": output.detach(),
        "features": features.grad,
        "gates": [p.grad for bank in block.banks for p in bank.gate.parameters()],
        "experts": [[[p.grad for p in expert.parameters()] for expert in bank.local_experts] for bank in block.banks],
        "counts": [bank.deepspeed_moe.exp_counts.tolist() for bank in block.banks],
        "totals": [bank.loads.total.tolist() for bank in block.banks],
    }


def by_hand(block: Block, features: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The sum over all banks and all of their experts, and how many tokens chose each."""
    rows = features.reshape(-1, D)
    output, counts = torch.zeros_like(rows), []
    for bank, router in zip(block.banks, BANKS, strict=True):
        gate = bank.gate
        weight = gate.key.cluster_weight + (gate.cluster_residual if router.get("learn") else 0)
        logits = rows @ weight.T + gate.key.cluster_bias
        k = router.get("top_k", 1)
        chosen = logits >= logits.sort(dim=-1, descending=True).values[:, k - 1 : k]
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}.get(router.get("weight"), 1.0)
        every = torch.stack([expert(rows) for expert in bank.local_experts], dim=1)
        output = output + ((chosen * scores)[..., None] * every).sum(1)
        counts.append(chosen.sum(0))
    return output.view_as(features), counts


@pytest.mark.parametrize(("world", "many_rows"), [(1, 1024), (2, 1024), (2, 0)])
def test_outputs_gradients_and_counts(world: int, many_rows: int) -> None:
    _, block = block_of_rank(0, 1)
    found = spawn(on_rank, world, many_rows, timeout=90, deepspeed=True)
    loss = torch.zeros(())
    for rank, mine in enumerate(found):
        features = features_of(rank).requires_grad_()
        output, counts = by_hand(block, features)
        torch.testing.assert_close(mine["output"], output)
        gates = [p for bank in block.banks for p in bank.gate.parameters()]
        wanted = torch.autograd.grad(output.square().sum(), [features, *gates], retain_graph=True)
        for gradient, plain in zip([mine["features"], *mine["gates"]], wanted, strict=True):
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-4)
        assert mine["counts"] == mine["totals"] == [row.tolist() for row in counts]
        loss = loss + output.square().sum()
    loss.backward()
    for b, bank in enumerate(block.banks):
        local = [gradients for mine in found for gradients in mine["experts"][b]]
        for gradients, expert in zip(local, bank.local_experts, strict=True):
            for gradient, parameter in zip(gradients, expert.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_where_tokens_stay_on_their_rank() -> None:
    layer: Any = SimpleNamespace(ep_size=2)
    experts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    many, few = torch.zeros(2 * 1024 + 1, 1, dtype=torch.int64), torch.zeros(2 * 1024, 1, dtype=torch.int64)
    stays = moe_bank._pays_to_stay
    assert stays(layer, many, experts) and not stays(layer, few, experts)
    assert not stays(SimpleNamespace(ep_size=1), many, experts)  # type: ignore[arg-type]
    assert not stays(layer, many.to("meta"), experts)
    with torch.no_grad():
        assert not stays(layer, many, experts)
    experts[0].weight.ds_tensor = torch.zeros(1)  # as ZeRO-3 leaves it
    assert not stays(layer, many, experts)
