"""The balance loss of learned routers, which travels in the graph of its own forward pass.

Switch's loss (Fedus et al., 2021, eq. 4) is E * sum over experts of f_i P_i: f_i the share of the tokens that go to
expert i, P_i the mean probability of i. On a micro-batch it depends on how the batch is split (Qiu et al., "Demons in
the Detail", 2025). Here f_i is that of the last optimizer step's global batch, and P_i is summed over the tokens and
divided by the tokens that a pass had on average in that step; so gradients, which are summed over passes and ranks, are
those of one pass over everything.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mocte_ds.moe.context import BatchContext
from mocte_ds.moe.forward import ForwardState

_TINY = 1e-20


@dataclass(frozen=True)
class Balance:
    """What the balance loss of one pass needs besides its probabilities."""

    share: Tensor
    """(E,) fp32 share of the choices in the last optimizer step; even before the first."""
    counted: Tensor | None = None
    """(n,) bool, False for padding; None: every token counts."""
    usual_tokens: float | None = None
    """Tokens of a pass in the last step, on average over passes and ranks; None: those of this one."""


def balance_loss(scores: Tensor, balance: Balance, normalised: bool) -> Tensor:
    """() E * sum over experts of (share of choices) * (mean probability): 1 when either is even.

    Args:
        scores: (n, E) of the tokens; probabilities, or sigmoids.
        balance: loads and divisor.
        normalised: whether a token's scores add up to 1. Sigmoids are divided by their sum first (DeepSeek-V3, 2024).
    """
    probability = scores if normalised else scores / (scores.sum(dim=-1, keepdim=True) + _TINY)
    tokens: Tensor | float = float(len(scores))
    if balance.counted is not None:
        counted = balance.counted.reshape(-1, 1).to(scores.device)
        probability, tokens = torch.where(counted, probability, 0.0), counted.sum().clamp(min=1)
    if balance.usual_tokens is not None:
        tokens = balance.usual_tokens
    return scores.shape[1] * (balance.share.to(scores.device) * (probability.sum(dim=0) / tokens)).sum()


def with_loss(weight: Tensor, loss: Tensor, state: ForwardState, layer: Any, context: BatchContext) -> Tensor:
    """The experts' weights, unchanged; the backward pass through them also adds the gradient of the balance loss.

    Args:
        weight: (n, k) of the experts' outputs; every loss's gradient passes through.
        loss: () with its graph.
        state: of the pass; it forgets the loss when the backward pass has come through.
        layer: whose loss it is.
        context: knows by how much the backward pass scales the model's loss.
    """
    return _WithLoss.apply(weight, loss, state, layer, context)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, loss: Tensor, state: ForwardState, layer: Any, context: BatchContext
    ) -> Tensor:
        ctx.state, ctx.layer, ctx.context, ctx.like = state, layer, context, (loss.dtype, loss.device)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        ctx.state.losses.pop(ctx.layer, None)
        scale = ctx.context.loss_scale
        dtype, device = ctx.like
        return gradient, torch.as_tensor(1.0 if scale is None else scale, dtype=dtype, device=device), None, None, None


def watched(loss: Tensor, context: BatchContext, factor: float = 1.0) -> Tensor:
    """The loss itself; when its backward pass begins, the context learns by how much it is scaled.

    Accumulation, fp16's loss scale and whatever else is done to the loss afterwards are done to balance losses too.

    Args:
        loss: () of the model.
        context: of the blocks.
        factor: what the balance losses are multiplied by beyond that.
    """
    return _Watched.apply(loss, context, factor)


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: BatchContext, factor: float) -> Tensor:
        ctx.context, ctx.factor = context, factor
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.context.loss_scale = gradient.detach().float() * ctx.factor
        return gradient, None, None
