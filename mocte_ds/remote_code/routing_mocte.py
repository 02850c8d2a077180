"""Which expert a token of an exported MO-CTE model goes to, in one pass or token by token; needs torch alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mocte import TABLES, MocteLMConfig
from .tokens_mocte import Tokens, state_in

# Shapes: B sequences of T tokens, d features, E experts.

# Logit of a table's expert over the others, under a learned router.
TABLE_LOGIT = 4.0


def read_tokens(
    config: MocteLMConfig,
    features: Tensor,
    ids: Tensor | None,
    given: dict[str, Any] | None = None,
    cache: Any = None,
) -> Tokens:
    """What the routers know of one call.

    Args:
        config: of the model.
        features: (B, T, d) embeddings.
        ids: (B, T) or None.
        given: further arguments of the call by name: padding and packing, see :func:`given_tokens`.
        cache: of keys and values; None: no generation.

    Raises:
        ValueError: a router cannot do without something that is not there.
    """
    kinds = {router["kind"] for router in config.routers} if config.expert_layers else set()
    if ids is None and kinds & set(TABLES):
        raise ValueError(f"routers of the kinds {sorted(kinds & set(TABLES))} need input_ids, not inputs_embeds.")
    remembers = cache is not None and bool(kinds & {"prefix", "previous"})
    cached = int(cache.get_seq_length()) if cache is not None else 0
    state = state_in(cache, cached) if remembers else None
    shape = (features.shape[0], features.shape[1])
    return Tokens.of(shape, ids, config.document_end_id, given or {}, state, cached)


class MocteRouter(nn.Module):
    """Chooses one or a few experts of a bank for each token."""

    def __init__(self, config: MocteLMConfig, router: dict[str, Any], name: str) -> None:
        """Allocate.

        Args:
            config: of the model.
            router: of this bank.
            name: what its state is kept under.
        """
        super().__init__()
        self.kind, self.weighing, self.name = router["kind"], router["weight"], name
        self.soft, self.scale = router["weight"] != "hard", router["scale"]
        self.num_experts = config.num_experts
        if self.kind in TABLES:
            self.register_buffer("table", torch.zeros(config.vocab_size, dtype=torch.int64))
        else:
            self.register_buffer("weight", torch.zeros(config.num_experts, config.hidden_size))
            self.register_buffer("bias", torch.zeros(config.num_experts))
        if self.weighing == "sigmoid":
            self.register_buffer("correction", torch.zeros(config.num_experts))
        self.unit_mean = router["unit_mean"]
        if self.unit_mean:
            self.register_buffer("mean", torch.ones(1))
        if router["learn"]:
            self.residual = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.learns, self.top_k, self.normalise = bool(router["learn"]), router["top_k"], router["normalise"]

    def forward(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """(B, T, k) experts of each token and weights of their outputs, None for 1; features are (B, T, d)."""
        # Never in autocast: logits that are rounded to bf16 send tokens elsewhere.
        with torch.autocast(features.device.type, enabled=False):
            return self._choose(features.float(), tokens)

    def _choose(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        index = None
        if self.kind in TABLES:
            ids = tokens.before() if self.kind == "previous" else tokens.ids
            index = self.table[ids.to(self.table.device)]
            if not self.soft:
                return index[..., None], None
            logits = TABLE_LOGIT * F.one_hot(index, self.num_experts).float()
        else:
            logits = F.linear(features if self.kind == "random" else features.detach(), self.weight, self.bias)
            if self.kind == "prefix":
                logits = tokens.running_mean(self.name, logits)
        if self.learns:
            logits = logits + F.linear(features, self.residual.float())
        if not self.soft:
            return logits.argmax(dim=-1, keepdim=True), None
        sigmoid = self.weighing == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        order = scores + self.correction if sigmoid else logits
        index = order.argmax(dim=-1, keepdim=True) if self.top_k == 1 else order.topk(self.top_k, dim=-1).indices
        weight = scores.gather(-1, index)
        if self.normalise:
            # Sigmoids may all be zero.
            weight = weight / (weight.sum(dim=-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
        weight = weight * self.scale
        return index, weight / self.mean if self.unit_mean else weight

    def _apply(self, fn: Callable, recurse: bool = True) -> "MocteRouter":
        """Moves with the model but stays in fp32: a boundary rounded to bf16 sends tokens elsewhere."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
