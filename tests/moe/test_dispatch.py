"""Every token reaches its expert and comes back: outputs and gradients against a loop over tokens."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mocte_ds.moe.dispatch import route_through
from mocte_ds.moe.rows import filled_up, gather_chunks, scatter_chunks
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


def on_rank(case: str, early: int | None) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = EXPERTS // world
    mine = make_experts()[rank * local : (rank + 1) * local]
    features, index = tokens(rank, case)
    group = torch.distributed.group.WORLD
    outputs, counts, _ = route_through(features, index[:, None], None, list(mine), EXPERTS, group, world, early=early)
    outputs.square().sum().backward()
    assert all(p.grad is not None for p in mine.parameters())  # an empty expert stays in the graph
    return outputs.detach(), [p.grad for p in mine.parameters()], counts.tolist()


@pytest.mark.parametrize(("world", "early"), [(2, None), (2, 0), (2, 1), (2, 2), (4, None), (4, 0)])
def test_ranks_agree_with_a_loop(world, early):
    for case in ("mixed", "one expert", "some empty", "no token"):
        outputs, gradients = expected(case, world)
        results = spawn(on_rank, world, case, early, timeout=60)
        for rank, (output, _, counts) in enumerate(results):
            torch.testing.assert_close(output, outputs[rank])
            assert sum(counts) == len(tokens(rank, case)[0])
        found = [gradient for _, local, _ in results for gradient in local]
        for gradient, reference in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, reference, msg=case)


def test_one_process_and_observer():
    features, index = tokens(1, "some empty")
    seen = {}
    outputs, counts, _ = route_through(
        features, index[:, None], None, list(make_experts()), EXPERTS, None, 1, lambda k, rows: seen.update({k: rows})
    )
    torch.testing.assert_close(outputs.detach(), expected("some empty", 2)[0][1])
    for k in range(EXPERTS):
        torch.testing.assert_close(seen[k], features[index == k])
    assert counts.tolist() == torch.bincount(index, minlength=EXPERTS).tolist()


def two_each(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, two experts per token, and their weights."""
    features, generator = tokens(rank, "mixed")[0].requires_grad_(), torch.Generator().manual_seed(9 + rank)
    index = torch.rand(len(features), EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    return features, index, torch.rand(index.shape, generator=generator).requires_grad_()


def through_dispatch(early: int | None) -> list[torch.Tensor]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = EXPERTS // world
    mine = make_experts()[rank * local : (rank + 1) * local]
    features, index, weight = two_each(rank)
    group = torch.distributed.group.WORLD if world > 1 else None
    outputs, counts, _ = route_through(features, index, weight, list(mine), EXPERTS, group, world, early=early)
    assert counts.tolist() == torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
    outputs.square().sum().backward()
    return [outputs.detach(), features.grad, weight.grad, *(p.grad for p in mine.parameters())]


@pytest.mark.parametrize(("world", "early"), [(1, None), (2, None), (2, 1)])
def test_weighted_sum_of_two_experts_against_a_loop(world, early):
    experts = make_experts()
    wanted = []
    for rank in range(world):
        features, index, weight = two_each(rank)
        rows = [
            sum(weight[t, j] * experts[int(index[t, j])](features[t]) for j in range(2)) for t in range(len(features))
        ]
        outputs = torch.stack(rows)
        outputs.square().sum().backward()
        wanted.append([outputs.detach(), features.grad, weight.grad])
    found = spawn(through_dispatch, world, early, timeout=60)
    for rank in range(world):
        torch.testing.assert_close(found[rank][:3], wanted[rank])
    gradients = [gradient for of_rank in found for gradient in of_rank[3:]]
    torch.testing.assert_close(gradients, [parameter.grad for parameter in experts.parameters()])


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_of_chunks_against_finite_differences(k):
    generator, count = torch.Generator().manual_seed(k), 5 * k
    order, sizes = torch.randperm(count, generator=generator), [0, count - 2, 2]
    rows = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(5, k, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: gather_chunks(r, order, sizes, k, [size + 2 for size in sizes]), rows)
    chunks = [torch.randn(size + 2, 3, dtype=torch.float64, generator=generator, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda w, *c: scatter_chunks(c, order, sizes, k, w), (weight, *chunks))
    assert torch.autograd.gradcheck(lambda *c: scatter_chunks(c, order, sizes, k, None), chunks)


@pytest.mark.parametrize("width", [3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_any_layout_in_memory(width: int, dtype: torch.dtype) -> None:
    """Wide and narrow ones, transposed ones, and ones that begin at an odd place."""
    order, sizes = torch.tensor([4, 0, 3, 1, 2]), [2, 3]
    odd = torch.randn(1 + 3 * width).to(dtype)[1:].view(3, width)
    chunks = [torch.randn(width, 2).to(dtype).t(), odd]
    expected = torch.cat(chunks)[order.argsort()]
    assert torch.equal(scatter_chunks(chunks, order, sizes, 1, None), expected)


def test_weights_multiply_in_fp32():
    """A weight between two bf16 numbers, whose rounding would show."""
    row, weight = torch.full((1, 1), 1.5, dtype=torch.bfloat16), torch.tensor([[1.0 + 2**-8 + 2**-9]])
    product = scatter_chunks([row], torch.zeros(1, dtype=torch.int64), [1], 1, weight)
    assert product.item() == (1.5 * weight).bfloat16().item() != (row * weight.bfloat16()).item()


def test_chunks_are_filled_up_a_little():
    counts = torch.arange(5000)
    filled = torch.tensor([filled_up(int(count)) for count in counts])
    assert (
        (filled >= counts).all()
        and (filled > 0).all()
        and (filled - counts <= torch.maximum(counts / 32, torch.tensor(16.0))).all()
    )
    assert len(filled.unique()) < 200  # numbers of rows that oneDNN compiles for


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
            outputs, *_ = route_through(features, index[:, None], None, list(experts), EXPERTS, None, 1)
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
    outputs, *_ = route_through(features, index[:, None], None, list(mine), EXPERTS, torch.distributed.group.WORLD, 2)
    outputs.square().sum().backward()
    return [p.grad is not None for p in mine.parameters()]


def test_ranks_with_frozen_experts_do_not_keep_others_waiting() -> None:
    assert spawn(with_frozen_experts_on_one_rank, 2, timeout=30) == [[False] * 4, [True] * 4]


class _Watched:
    """An exchange under way; tells when somebody has waited for it."""

    def __init__(self, work: Any, told: list[str]) -> None:
        self._work, self._told = work, told

    def wait(self) -> None:
        self._work.wait()
        self._told.append("arrived")


class _Ran(torch.autograd.Function):
    """Tells when an expert runs on real rows, in both passes."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, name: str, told: list[str]) -> torch.Tensor:
        ctx.name, ctx.told = name, told
        told.append(name)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        ctx.told.append(ctx.name)
        return gradient, None, None


def what_happens_in_turn(beside: bool) -> tuple[list[str], list[str], list[int]]:
    """Of a forward and of a backward pass; and how many rows each exchange sent to each rank."""
    rank, told, sent = torch.distributed.get_rank(), list[str](), list[int]()
    original = torch.distributed.all_to_all_single

    def watched(output: Any, rows: Any, receive: Any = None, send: Any = None, **settings: Any) -> Any:
        work = original(output, rows, receive, send, **settings)
        if send is None:  # of counts
            return work
        told.append("leaves")
        sent.extend(send)
        return _Watched(work, told)

    mine = make_experts()[2 * rank : 2 * rank + 2]
    for number, expert in enumerate(mine):
        # Features are the number of the rank that they come from.
        expert.register_forward_pre_hook(
            lambda _, args, number=number: (_Ran.apply(args[0], f"{number} of {args[0][0, 0].item():.0f}", told),)
        )
    index = torch.arange(EXPERTS).repeat_interleave(torch.tensor([3, 2, 5, 4]))
    features = torch.full((len(index), WIDTH), float(rank), requires_grad=True)
    shared = nn.Linear(WIDTH, WIDTH)
    with patch.object(torch.distributed, "all_to_all_single", watched):
        work = (lambda: shared(_Ran.apply(features, "beside", told))) if beside else None
        routed = route_through(
            features,
            index[:, None],
            None,
            list(mine),
            EXPERTS,
            torch.distributed.group.WORLD,
            2,
            beside=work,
            early=1,
        )
        forward = list(told)
        told.clear()
        loss = routed.outputs.square().sum()
        (loss if routed.beside is None else loss + routed.beside.square().sum()).backward()
    return forward, told, sent


@pytest.mark.parametrize("beside", [False, True])
def test_rows_travel_while_experts_run_on_those_that_stay(beside: bool) -> None:
    for rank, (forward, backward, sent) in enumerate(spawn(what_happens_in_turn, 2, beside, timeout=60)):
        own, other, shared = rank, 1 - rank, ["beside"] * beside
        there = ["leaves", *shared, f"0 of {own}", "arrived", f"0 of {other}", f"1 of {other}"]
        assert forward == [*there, "leaves", f"1 of {own}", "arrived"]
        back = ["leaves", f"1 of {own}", "arrived", f"1 of {other}", f"0 of {other}"]
        assert backward == [*back, "leaves", f"0 of {own}", *shared, "arrived"]
        away, come = (9, 5) if rank == 0 else (5, 9)
        expected = [[0, away], [0, come], [0, away], [0, come]] if rank == 0 else [[away, 0], [come, 0]] * 2
        assert [sent[i : i + 2] for i in range(0, 8, 2)] == expected
