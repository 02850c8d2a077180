"""Which expert a token goes to: the nearest cluster of its feature, or a table from token ids to clusters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocte_ds.errors import MocteError


class ClusterGate(nn.Module):
    """Routes by clusters that were read from the features at emergence; nothing in it is trained.

    The linear gate is the nearest centroid, logits = 2 C V^T (h - mu) - |C|^2 + b (docs/method.md, section 4), stored
    as one (E, d) matrix and one (E,) vector. Shapes: T tokens, d features, E experts.
    """

    def __init__(self, hidden_size: int, num_experts: int, kind: str, weight: str, vocab_size: int | None) -> None:
        """Allocate an empty gate.

        Args:
            hidden_size: d.
            num_experts: E.
            kind: `token` (linear gate), `type` or `hash` (tables).
            weight: `hard` (1) or `softmax` (probability of the chosen expert).
            vocab_size: entries of a table; only used by `type` and `hash`.
        """
        super().__init__()
        self.kind, self.weight_kind = kind, weight
        if kind == "token":
            # DeepSpeed takes names with "expert" in them for expert parameters and drops them from checkpoints.
            self.register_buffer("cluster_weight", torch.zeros(num_experts, hidden_size))
            self.register_buffer("cluster_bias", torch.zeros(num_experts))
        else:
            self.register_buffer("cluster_table", torch.zeros(vocab_size or 0, dtype=torch.int64))

    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Store a linear gate: (E, d) and (E,)."""
        self.cluster_weight.copy_(weight)
        self.cluster_bias.copy_(bias)

    def set_table(self, table: Tensor) -> None:
        """Store a table: (vocab,) expert of each token id."""
        self.cluster_table.copy_(table)

    def forward(self, features: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Choose one expert a token.

        Args:
            features: (T, d).
            token_ids: (T,) ids; needed by tables only.

        Returns:
            (T,) int64 expert of each token, and its weight (T,) or None for the hard weight 1.

        Raises:
            MocteError: a table without token ids, or a token id outside of it.
        """
        if self.kind == "token":
            logits = torch.nn.functional.linear(features.detach().float(), self.cluster_weight, self.cluster_bias)
            index = logits.argmax(dim=-1)
            if self.weight_kind == "hard":
                return index, None
            return index, logits.softmax(dim=-1).gather(1, index[:, None]).squeeze(1).to(features.dtype)
        if token_ids is None or token_ids.numel() != features.shape[0]:
            raise MocteError(
                f"router.kind '{self.kind}' needs the token ids: call the model with input_ids=(batch, length)."
            )
        return self.cluster_table[token_ids.reshape(-1)], None

    def _apply(self, fn: Callable, recurse: bool = True) -> "ClusterGate":
        """Moves with the model but keeps its precision: a boundary rounded to bf16 sends tokens elsewhere."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _set_ep_group(self, _group: object) -> None:
        """DeepSpeed hands every gate its expert-parallel group; this gate needs none."""
