"""Gradients of whole parameters over tensor ranks: counted once, refused where they differ, made the same in pieces."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mocte_ds.errors import MocteError
from mocte_ds.zero.agreement import agreed_total, take_first
from tests.spawn import spawn

FP32, BF16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
NAMES = ["trunk", None, "front", None]
# Squared norms of four groups on a rank (data, tensor); two groups are whole.
AS_THEY_ARE = [[[4.0, 1.0, 9.0, 0.5], [4.0, 2.0, 9.0, 0.25]], [[1.0, 3.0, 0.0, 8.0], [1.0, 5.0, 0.0, 7.0]]]
EXPECTED = (4.0 + 9.0) + (1.0 + 2.0 + 0.5 + 0.25) + (1.0 + 0.0) + (3.0 + 5.0 + 8.0 + 7.0)


def squares(front: float, data: int = 1, tensor: int = 1) -> list:
    """As they are, with the square of the unit `front` on one rank."""
    found = torch.tensor(AS_THEY_ARE)
    found[data, tensor, 2] = front
    return found.tolist()


CASES = {
    "as they are": (AS_THEY_ARE, FP32),
    "rounded": (squares(9.0 * (1 + 5e-4), 0), FP32),
    "apart by a thousandth": (squares(9.0 * (1 + 2e-3), 0), FP32),
    "a gradient that is the rounding of others": (squares(EXPECTED * 1e-15), FP32),
    "a small gradient that is none": (squares(EXPECTED * 1e-12), FP32),
    "the same in bf16": (squares(EXPECTED * 1e-12), BF16),
    "a small gradient in bf16": (squares(EXPECTED * 1e-3), BF16),
    **{
        f"{value} on data rank {data}, tensor rank {tensor}": (squares(value, data, tensor), FP32)
        for value in (float("inf"), float("nan"))
        for data in (0, 1)
        for tensor in (0, 1)
    },
}


def _groups() -> tuple[int, int, Any, Any]:
    """Two data-parallel ranks by two tensor ranks, which are neighbours."""
    made = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))}
    data, tensor = divmod(dist.get_rank(), 2)
    return data, tensor, made[tensor, tensor + 2], made[2 * data, 2 * data + 1]


def totals() -> dict[str, Any]:
    """What this rank gets in each case."""
    data, tensor, data_group, tensor_group = _groups()
    found: dict[str, Any] = {}
    for name, (given, rounding) in CASES.items():
        own = torch.tensor(given)[data, tensor]
        try:
            found[name] = float(agreed_total(own, NAMES, rounding, data_group, tensor_group, tensor))
        except MocteError as error:
            found[name] = str(error)
    nothing = agreed_total(torch.tensor([2.0]), [None], FP32, data_group, tensor_group, tensor)
    return {**found, "all cut": float(nothing)}


def test_what_is_counted_and_what_is_refused() -> None:
    ranks = spawn(totals, 4, timeout=90)
    assert all(found == pytest.approx(ranks[0], nan_ok=True) for found in ranks[1:]), "all ranks do the same"
    found = ranks[0]
    for name in ("as they are", "rounded", "a gradient that is the rounding of others", "the same in bf16"):
        assert found[name] == pytest.approx(EXPECTED, rel=1e-6), name
    for name, group in (
        ("apart by a thousandth", "0, 1"),
        ("a small gradient that is none", "2, 3"),
        ("a small gradient in bf16", "2, 3"),
    ):
        assert found[name].startswith(f"the gradient of front differs between the tensor ranks {group}"), name
    # Such a step is dropped, whichever rank it comes from.
    for value, is_one in (("inf", math.isinf), ("nan", math.isnan)):
        sums = [total for name, total in found.items() if name.startswith(value)]
        assert len(sums) == 4 and all(map(is_one, sums))
    assert found["all cut"] == 8.0


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made within."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self.numbers = max(self.numbers, made.numel())
        return made


def firsts() -> tuple[list[torch.Tensor], int]:
    """Gradients of this rank after they have been made the same, and the largest copy on the way."""
    rank = dist.get_rank()
    flat = torch.arange(140.0) + 1000 * rank
    gradients = [*flat.split([3, 5, 0, 7, 100, 1, 24]), (torch.arange(6.0) + rank).view(2, 3).T]
    with Largest() as largest:
        take_first(gradients, dist.group.WORLD, piece=16)
    return gradients, largest.numbers


def test_gradients_become_those_of_the_first_rank_in_pieces() -> None:
    (expected, _), *others = spawn(firsts, 2, timeout=60)
    assert torch.equal(torch.cat([part.reshape(-1) for part in expected[:-1]]), torch.arange(140.0))
    for found, largest in others:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert largest <= 16, "a copy of a large gradient, or of all of them"
