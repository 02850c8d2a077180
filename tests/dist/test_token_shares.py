"""Shares of tokens: what ranks make of theirs together is what one makes of all, gradients included."""

import pytest
import torch
import torch.distributed as dist

from mocte_ds.dist.mesh import Axis, mesh_of_processes
from mocte_ds.dist.token_shares import TokenShares
from tests.spawn import spawn


@pytest.mark.parametrize(
    ("tokens", "ranks", "sizes"), [(7, 3, (3, 2, 2)), (1, 2, (1, 0)), (0, 2, (0, 0)), (6, 2, (3, 3))]
)
def test_sizes_and_rows(tokens: int, ranks: int, sizes: tuple[int, ...]) -> None:
    rows = torch.arange(2.0 * tokens).view(tokens, 2)
    shares = [TokenShares.of(Axis(None, rank, ranks), tokens) for rank in range(ranks)]
    assert all(share.sizes == sizes for share in shares)
    assert torch.equal(torch.cat([share.own(rows) for share in shares]), rows)


def _work(features: torch.Tensor, weight: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    made = torch.tanh(features @ matrix)
    return made if weight is None else made * weight.sum(1, keepdim=True)


def _problem(tokens: int, weighted: bool, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(tokens)
    features, weight = torch.randn(tokens, 4, generator=generator), torch.rand(tokens, 2, generator=generator)
    matrix, after = torch.randn(4, 3, generator=generator), torch.randn(tokens, 3, generator=generator)
    leaves = [t.to(dtype).requires_grad_() for t in (features, matrix)]
    return leaves[0], weight.to(dtype).requires_grad_() if weighted else None, leaves[1], after.to(dtype)


def shared(tokens: int, weighted: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs, and the gradients of features, weight and of this rank's own part of the matrix's, summed."""
    features, weight, matrix, after = _problem(tokens, weighted, dtype)
    axis = mesh_of_processes().world
    shares = TokenShares.of(axis, tokens)
    outputs = shares.join(_work(*shares.take(features, weight), matrix))
    (outputs * after).sum().backward()
    assert matrix.grad is not None and features.grad is not None
    dist.all_reduce(matrix.grad, group=axis.group)
    return [t.detach() for t in (outputs, features.grad, matrix.grad, *([] if weight is None else [weight.grad]))]


@pytest.mark.parametrize(("tokens", "weighted", "dtype"), [(7, True, torch.float32), (1, False, torch.float32)])
def test_values_and_gradients_are_those_of_one_rank(tokens: int, weighted: bool, dtype: torch.dtype) -> None:
    features, weight, matrix, after = _problem(tokens, weighted, dtype)
    outputs = _work(features, weight, matrix)
    (outputs * after).sum().backward()
    expected = [outputs, features.grad, matrix.grad, *([] if weight is None else [weight.grad])]
    for found in spawn(shared, 3, tokens, weighted, dtype, timeout=90):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_needs_no_gradient_comes_without() -> None:
    """Else the backward pass would keep all experts' outputs, for weights that nobody learns."""
    features, weight = torch.randn(3, 4), torch.rand(3, 2)
    shares = TokenShares.of(Axis(None, 1, 2), 3)
    for given in ((features.clone().requires_grad_(), weight), (features, weight.clone().requires_grad_())):
        own = shares.take(*given)
        assert [part.requires_grad for part in own] == [whole.requires_grad for whole in given]


def exact() -> torch.Tensor:
    """bf16 rows of each rank, joined."""
    axis = mesh_of_processes().world
    rows = torch.arange(10.0).view(5, 2).to(torch.bfloat16) / 3
    return TokenShares.of(axis, 5).join(TokenShares.of(axis, 5).own(rows))


def test_bits_are_kept() -> None:
    for found in spawn(exact, 2, timeout=60):
        assert torch.equal(found, torch.arange(10.0).view(5, 2).to(torch.bfloat16) / 3)
