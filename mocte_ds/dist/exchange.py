"""Sends rows of a matrix to the ranks that need them, and their gradients back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.watch import HEART, phase


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.where = send, receive, group, HEART.name
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        with phase(ctx.where or "experts"):
            return _all_to_all(gradient.contiguous(), ctx.receive, ctx.send, ctx.group), None, None, None


def exchange_rows(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    """Send ``send[r]`` consecutive rows to rank r of the group and receive ``receive[r]`` rows from it.

    Args:
        rows: (sum(send), d), ordered by destination rank.
        send: rows for each rank of the group.
        receive: rows from each rank of the group.
        group: process group.

    Returns:
        (sum(receive), d), ordered by source rank; differentiable.
    """
    return _Exchange.apply(rows, send, receive, group)


def exchange_counts(counts: Tensor, group: Any) -> Tensor:
    """Tell every rank of the group how many rows to expect.

    Args:
        counts: (world, n) int64, row r for rank r.
        group: process group.

    Returns:
        (world, n) int64, row r from rank r.
    """
    received = torch.empty_like(counts)
    with phase("all-to-all of counts", waits=True):
        dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = rows.new_empty((sum(receive), rows.shape[1]))
    with phase("all-to-all", waits=True):
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
