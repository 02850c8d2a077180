"""Every token reaches its expert and comes back: outputs and gradients against a loop over tokens."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mocte_ds.moe.dispatch import route_through
from tests.spawn import spawn

EXPERTS, WIDTH = 4, 6


def make_experts() -> nn.ModuleList:
    torch.manual_seed(3)
    return nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)])


def tokens(rank: int, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(7 + 60 * rank, WIDTH, generator=generator)
    index = torch.randint(EXPERTS, (len(features),), generator=generator)
    if case == "one expert":
        index.fill_(2)
    if case == "some empty":
        index = index % 2 * 3
    if case == "no token":
        features, index = features[:0], index[:0]
    return features, index


def expected(case: str, world: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of each rank, and gradients of all experts, from a loop over tokens."""
    experts, outputs = make_experts(), []
    loss = 0.0
    for rank in range(world):
        features, index = tokens(rank, case)
        rows = [experts[int(k)](x) for x, k in zip(features, index, strict=True)]
        outputs.append(torch.stack(rows).detach() if rows else features)
        loss = loss + sum((row.square().sum() for row in rows), torch.zeros(()))
    gradients = torch.autograd.grad(loss, list(experts.parameters()), allow_unused=True) if loss.requires_grad else ()
    full = [g if g is not None else torch.zeros_like(p) for g, p in zip(gradients, experts.parameters(), strict=False)]
    return outputs, full or [torch.zeros_like(p) for p in experts.parameters()]


def on_rank(case: str) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = EXPERTS // world
    mine = make_experts()[rank * local : (rank + 1) * local]
    features, index = tokens(rank, case)
    group = torch.distributed.group.WORLD
    outputs, counts = route_through(features, index, list(mine), EXPERTS, group, world)
    outputs.square().sum().backward()
    assert all(p.grad is not None for p in mine.parameters())  # an empty expert stays in the graph
    return outputs.detach(), [p.grad for p in mine.parameters()], counts.tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_a_loop(world):
    for case in ("mixed", "one expert", "some empty", "no token"):
        outputs, gradients = expected(case, world)
        results = spawn(on_rank, world, case, timeout=60)
        for rank, (output, _, counts) in enumerate(results):
            torch.testing.assert_close(output, outputs[rank])
            assert sum(counts) == len(tokens(rank, case)[0])
        found = [gradient for _, local, _ in results for gradient in local]
        for gradient, reference in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, reference, msg=case)


def test_one_process_and_observer():
    features, index = tokens(1, "some empty")
    seen = {}
    outputs, counts = route_through(
        features, index, list(make_experts()), EXPERTS, None, 1, lambda k, rows: seen.update({k: rows})
    )
    torch.testing.assert_close(outputs.detach(), expected("some empty", 2)[0][1])
    for k in range(EXPERTS):
        torch.testing.assert_close(seen[k], features[index == k])
    assert counts.tolist() == torch.bincount(index, minlength=EXPERTS).tolist()


def test_frozen_experts_compute_no_weight_gradient() -> None:
    """By torch's own count of the products of matrices."""
    rows = 64 * torch.arange(1, EXPERTS + 1)  # multiples of what a CPU pads to
    index = torch.arange(EXPERTS).repeat_interleave(rows)
    features = torch.randn(len(index), WIDTH, requires_grad=True)

    def products(frozen: set[int]) -> int:
        experts = make_experts()
        for k in frozen:
            experts[k].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            outputs, _ = route_through(features, index, list(experts), EXPERTS, None, 1)
            outputs.square().sum().backward()
        assert all((p.grad is None) == (k in frozen) for k in range(EXPERTS) for p in experts[k].parameters())
        return counter.get_total_flops()

    for frozen in ({1}, {0, 3}, set(range(EXPERTS))):
        saved = sum(2 * int(rows[k]) * WIDTH * WIDTH for k in frozen)
        assert products(set()) - products(frozen) == saved


def with_frozen_experts_on_one_rank() -> list[bool]:
    rank = torch.distributed.get_rank()
    mine = make_experts()[2 * rank : 2 * rank + 2]
    mine.requires_grad_(rank == 1)
    features, index = tokens(rank, "mixed")  # nothing below trains: they need no gradient
    outputs, _ = route_through(features, index, list(mine), EXPERTS, torch.distributed.group.WORLD, 2)
    outputs.square().sum().backward()
    return [p.grad is not None for p in mine.parameters()]


def test_ranks_with_frozen_experts_do_not_keep_others_waiting() -> None:
    assert spawn(with_frozen_experts_on_one_rank, 2, timeout=30) == [[False] * 4, [True] * 4]
