"""Sends rows of a matrix to the ranks that need them, and their gradients back, while other work goes on."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mocte_ds.watch import HEART, phase


class RowExchange:
    """An all-to-all of rows that is started and waited for; in the backward pass that of their gradients.

    Autograd runs the nodes of a graph in the reverse order of their making: what a forward pass computes between
    :meth:`start` and :meth:`wait` is computed between the two in the backward pass as well.
    """

    def __init__(self, send: list[int], receive: list[int], group: Any) -> None:
        """Nothing is under way.

        Args:
            send: rows for each rank of the group.
            receive: rows from each rank of the group.
            group: process group.
        """
        self._send, self._receive, self._group, self._where = send, receive, group, HEART.name
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send ``send[r]`` consecutive rows to rank r of the group.

        Args:
            rows: (sum(send), d), ordered by destination rank.

        Returns:
            (sum(receive), d) whose values are not there yet: for :meth:`wait`, and for nothing else.
        """
        return _Start.apply(rows, self)

    def wait(self, coming: Tensor) -> Tensor:
        """Wait for the rows.

        Args:
            coming: from :meth:`start`.

        Returns:
            (sum(receive), d), ordered by source rank; differentiable once.
        """
        return _Wait.apply(coming, self)

    def _begin(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows, coming = rows.contiguous(), rows.new_empty((sum(receive), rows.shape[1]))
        work = dist.all_to_all_single(coming, rows, receive, send, group=self._group, async_op=True)
        self._under_way = work, rows, coming
        return coming

    def _end(self) -> Tensor:
        assert self._under_way is not None
        (work, _, coming), self._under_way = self._under_way, None
        with phase("all-to-all", waits=True):
            work.wait()
        return coming


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._begin(rows, exchange._send, exchange._receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _other: Tensor) -> tuple:
        with phase(ctx.exchange._where or "experts"):
            return ctx.exchange._end(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        exchange._end()
        return coming.view_as(coming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        exchange = ctx.exchange
        with phase(exchange._where or "experts"):
            exchange._begin(gradient, exchange._receive, exchange._send)
        # Autograd asks for a gradient of this shape here. The one that travels has another, and _Start takes it.
        return gradient, None


class CountExchange:
    """Tells every rank of a group how many rows to expect."""

    def __init__(self, counts: Tensor, group: Any) -> None:
        """Send.

        Args:
            counts: (world, n) int64, row r for rank r.
            group: process group.
        """
        self._counts, self._received = counts.contiguous(), torch.empty_like(counts)
        self._work = dist.all_to_all_single(self._received, self._counts, group=group, async_op=True)

    def wait(self) -> Tensor:
        """(world, n) int64, row r from rank r."""
        with phase("all-to-all of counts", waits=True):
            self._work.wait()
        return self._received
