"""Ranks that read the same tokens work on a share of them each, and bring the results together."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.dist.collectives import wire_device
from mocte_ds.dist.mesh import Axis
from mocte_ds.watch import phase


@dataclass(frozen=True)
class TokenShares:
    """Which of T tokens, the same on all ranks of an axis, each rank works on: neighbouring ones, about T / n."""

    axis: Axis
    sizes: tuple[int, ...]
    """Tokens of each rank."""

    @classmethod
    def of(cls, axis: Axis, tokens: int) -> "TokenShares":
        """Shares of ``tokens`` tokens."""
        least, more = divmod(tokens, axis.size)
        return cls(axis, tuple(least + (rank < more) for rank in range(axis.size)))

    def own(self, t: Tensor) -> Tensor:
        """This rank's rows of (T, ...), without a gradient of its own."""
        return t.narrow(0, sum(self.sizes[: self.axis.rank]), self.sizes[self.axis.rank])

    def take(self, features: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """This rank's rows; the gradient on every rank is that of all rows (collective in the backward pass).

        Args:
            features: (T, d).
            weight: (T, k), or None.
        """
        if weight is None:
            return _Take.apply(self, features), None
        return _Take.apply(self, features, weight)

    def join(self, rows: Tensor) -> Tensor:
        """(T, d) of all ranks from the rows of each (collective); the gradient is this rank's part of it."""
        return _Join.apply(self, rows)

    def gathered(self, rows: Tensor) -> Tensor:
        """(T, ...) of all ranks from the rows of each, bit for bit, on every rank (collective)."""
        wire = wire_device(rows.device, self.axis)
        padded = rows.new_zeros((max(self.sizes), *rows.shape[1:]), device=wire)
        padded[: len(rows)] = rows
        if not padded.numel():
            return rows.new_zeros((sum(self.sizes), *rows.shape[1:]))
        flat = padded.reshape(len(padded), -1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in self.sizes]
        with phase("gathering of tokens", waits=True):
            dist.all_gather(parts, flat, group=self.axis.group)
        own = [part[:size] for part, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(own).view(rows.dtype).reshape(-1, *rows.shape[1:]).to(rows.device)


class _Take(torch.autograd.Function):
    """Both tensors in one, so that all ranks gather their gradients in the same order."""

    @staticmethod
    def forward(ctx: Any, shares: TokenShares, *whole: Tensor) -> Any:
        ctx.shares = shares
        parts = tuple(shares.own(t).clone() for t in whole)
        # Otherwise weights that nobody learns would make the backward pass keep the outputs of all experts.
        ctx.mark_non_differentiable(*(t for t, w in zip(parts, ctx.needs_input_grad[1:], strict=True) if not w))
        return parts if len(parts) > 1 else parts[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        wanted = ctx.needs_input_grad[1:]
        return None, *(ctx.shares.gathered(g) if w else None for g, w in zip(gradients, wanted, strict=True))


class _Join(torch.autograd.Function):
    """Every rank computes the same from the joined rows, so that its gradient is whole already."""

    @staticmethod
    def forward(ctx: Any, shares: TokenShares, rows: Tensor) -> Tensor:
        ctx.shares = shares
        return shares.gathered(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return None, ctx.shares.own(gradient).contiguous()
