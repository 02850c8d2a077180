"""Comparison of outputs up to rounding, without tokens so near to a routing boundary that rounding picks the expert."""

import torch
from torch import Tensor

from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block
from mocte_ds.moe.keys import LinearKey, OnlineKey

# Largest accepted difference in fp32, relative to the largest value; sums are taken in another order.
TOLERANCE = 1e-4
# Tokens whose last chosen expert and the next one are closer than this, relative to |row of the gate| |feature|, may go
# to either by rounding.
MARGIN = 2e-6


def margins(block: Block, features: Tensor) -> Tensor:
    """How far the last chosen expert's logit is above the next, relative to |row| |feature|, in the closest bank.

    Args:
        block: with its weights; the pass that it runs in knows the token ids.
        features: (B, T, d).

    Returns:
        (B, T); infinite where tables decide alone.
    """
    least = torch.full(features.shape[:2], torch.inf)
    rows = features.reshape(-1, features.shape[-1]).float()
    for bank in block.banks:
        gate = bank.gate
        linear = isinstance(gate.key, LinearKey)
        learned = gate.router.learns_choice
        online = isinstance(gate.key, OnlineKey)
        if not linear and not online and not learned:
            continue
        tokens = block.context.current().tokens(features.shape)
        logits = gate.logits(rows, tokens) if learned else gate.key.logits(rows, tokens)
        matrix = gate.key.cluster_weight if linear else torch.zeros(logits.shape[1], 1)
        if learned:
            matrix = matrix + gate.cluster_residual.float() + getattr(gate.key, "cluster_start", 0.0)
        k = gate.router.top_k
        if k == logits.shape[1]:
            continue  # every token goes to all of them
        ordered = gate.order(logits)
        best, chosen = ordered.topk(k, dim=-1)
        # Each logit is rounded relative to its own row, and rows of one gate may differ by orders of magnitude.
        norms = matrix.norm(dim=1).expand(logits.shape[1])
        scale = torch.maximum(norms[chosen][:, :, None], norms) * rows.norm(dim=-1)[:, None, None]
        if isinstance(gate.key, OnlineKey):
            scale = scale + gate.key.spread(rows)[:, None, None]
        if gate.router.weight == "sigmoid":
            scale = scale.clamp(min=1.0)  # sigmoids are rounded themselves
        apart = (best[:, :, None] - ordered[:, None, :]) / scale.clamp(min=1e-30)
        others = torch.ones_like(ordered, dtype=torch.bool).scatter(1, chosen, False)
        apart = apart.masked_fill(~others[:, None, :], torch.inf).amin(dim=(1, 2))
        least = torch.minimum(least, apart.view(least.shape))
    return least


def require_close(values: Tensor, expected: Tensor, what: str) -> float:
    """Largest difference relative to the largest value.

    Raises:
        CheckpointError: it is more than rounding.
    """
    difference = ((values - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{what} differ from the trained model's by {difference:.1e} of their largest value (allowed: "
            f"{TOLERANCE:.0e}); the export would be another model."
        )
    return difference
