"""Copies rows of tokens into one chunk per expert, and back with the experts' weights: one copy each way.

Autograd's own indexing adds gradients up row by row, because an index may repeat. Here none does: the gradient of one
way is the other way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEAST, _PARTS = 16, 32

# Shapes: T tokens, k choices per token, d features. Choice j of token t has the slot t * k + j.


def gather_chunks(rows: Tensor, order: Tensor, sizes: list[int], k: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """The rows of all slots, cut into chunks; differentiable once.

    Args:
        rows: (T, d).
        order: (T k,) int64, every slot once.
        sizes: slots of each chunk, one chunk after the other in ``order``.
        k: choices per token.
        lengths: rows of each chunk, at least its size; those beyond it are zeros (see :func:`padded_sizes`).

    Returns:
        For each chunk (its length, d).
    """
    return _Gather.apply(rows, order, sizes, k, lengths)


def scatter_chunks(chunks: Sequence[Tensor], order: Tensor, sizes: list[int], k: int, weight: Tensor | None) -> Tensor:
    """Weighted sum over each token's slots of the rows of chunks; differentiable once.

    Args:
        chunks: for each (at least its size, d); rows beyond its size are left out, and get the gradient 0.
        order: as of :func:`gather_chunks`.
        sizes: as there.
        k: as there.
        weight: (T, k) of the rows, which are multiplied in its precision and then rounded to theirs; None: 1.

    Returns:
        (T, d).
    """
    return _Scatter.apply(order, sizes, k, weight, *chunks)


def padded_sizes(sizes: Sequence[int], device: torch.device) -> list[int]:
    """Rows of the chunks that experts are to read: at least one, and on a CPU :func:`filled_up`."""
    return [filled_up(size) if device.type == "cpu" else max(1, size) for size in sizes]


def filled_up(count: int) -> int:
    """Rows that a CPU multiplies for a chunk of ``count``: at most 1/32 more, but 16 at least.

    oneDNN compiles kernels for every new number of rows, which costs more than the product itself.
    """
    step = _LEAST
    while 2 * _PARTS * step <= count:
        step *= 2
    return max(step, -(-count // step) * step)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, order: Tensor, sizes: list[int], k: int, lengths: list[int]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(order)
        ctx.sizes, ctx.k = sizes, k
        tokens = order if k == 1 else order // k
        if rows.device.type == "cpu":
            return tuple(_chunk(rows, *place) for place in zip(tokens.split(sizes), lengths, strict=True))
        chunks = rows.index_select(0, tokens).split(sizes)
        filled = zip(chunks, lengths, strict=True)
        return tuple(c if len(c) == n else F.pad(c, (0, 0, 0, n - len(c))) for c, n in filled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (order,) = ctx.saved_tensors
        return _sum_by_token(gradients, order, ctx.sizes, ctx.k), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Tensor, sizes: list[int], k: int, weight: Tensor | None, *chunks: Tensor) -> Tensor:
        ctx.save_for_backward(order, weight, *(chunks if ctx.needs_input_grad[3] else ()))
        ctx.sizes, ctx.k, ctx.lengths = sizes, k, [len(chunk) for chunk in chunks]
        return _sum_by_token(chunks, order, sizes, k, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        order, weight, *chunks = ctx.saved_tensors
        parts = order.split(ctx.sizes)
        tokens = parts if ctx.k == 1 else (order // ctx.k).split(ctx.sizes)
        of_chunks = [_chunk(gradient, *place) for place in zip(tokens, ctx.lengths, strict=True)]
        if weight is None:
            return None, None, None, None, *of_chunks
        flat, of_weight, wide = weight.reshape(-1, 1), weight.new_empty(weight.numel()), _Wide(ctx.sizes, gradient, 2)
        for number, places in enumerate(parts):
            rows = of_chunks[number][: len(places)]
            given, product = wide(len(places))
            if chunks:
                torch.mul(given.copy_(rows), chunks[number][: len(places)], out=product)
                of_weight[places] = product.sum(dim=1).to(of_weight.dtype)
            rows.copy_(torch.mul(rows, flat[places], out=given))
        return None, None, None, of_weight.view_as(weight) if chunks else None, *of_chunks


class _Wide:
    """Room for the rows of one chunk at a time, in fp32 or wider: to allocate it for each costs more than its use."""

    def __init__(self, sizes: list[int], like: Tensor, count: int) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._room = like.new_empty((count, max(sizes), like.shape[1]), dtype=dtype)

    def __call__(self, rows: int) -> Sequence[Tensor]:
        return self._room[:, :rows].unbind()


def _chunk(rows: Tensor, places: Tensor, length: int) -> Tensor:
    """(length, d) the rows at some places, followed by zeros."""
    chunk, count = rows.new_empty((length, rows.shape[1])), len(places)
    torch.index_select(rows, 0, places, out=chunk[:count])
    chunk[count:].zero_()
    return chunk


def _sum_by_token(
    chunks: Sequence[Tensor], order: Tensor, sizes: list[int], k: int, weight: Tensor | None = None
) -> Tensor:
    """(T, d) sums of the rows of each token's slots, times their weights."""
    slots = chunks[0].new_empty((len(order), chunks[0].shape[1]))
    rows = [chunk[:size] for chunk, size in zip(chunks, sizes, strict=True)]
    places: Sequence[Tensor] = order.split(sizes)
    if slots.device.type != "cpu":  # few kernels, where a CPU's cache holds one chunk at a time
        rows, places, sizes = [torch.cat(rows)], [order], [len(order)]
    wide = None if weight is None else _Wide(sizes, slots, 1)
    for part, place in zip(rows, places, strict=True):
        if weight is not None and wide is not None:
            (product,) = wide(len(place))
            part = torch.mul(part, weight.reshape(-1, 1)[place], out=product).to(slots.dtype)
        _set_rows(slots, place, part)
    return slots if k == 1 else slots.view(-1, k, slots.shape[1]).sum(dim=1)


def _set_rows(target: Tensor, places: Tensor, rows: Tensor) -> None:
    """target[places] = rows, 16 bytes at a time where they can be: number by number takes 5 times as long in bf16."""
    rows = rows.contiguous()
    if all(t.shape[1] * t.itemsize % 16 == 0 and t.storage_offset() * t.itemsize % 16 == 0 for t in (target, rows)):
        target, rows = target.view(torch.complex128), rows.view(torch.complex128)
    target[places] = rows
