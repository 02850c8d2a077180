"""Which expert a token of an exported MO-CTE model goes to, in one pass or token by token; needs torch alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mocte import TABLES, MocteLMConfig

# Shapes: B sequences of T tokens, d features, E experts.

# Logit of a table's expert over the others, under a learned router.
TABLE_LOGIT = 4.0


class RoutingState:
    """What routers remember of the tokens so far: one more layer of transformers' cache.

    Beam search reorders it, batches are repeated or selected, and assisted generation crops it together with the keys
    and values, because the cache does these things to all of its layers. So that any number of tokens can be taken
    back, the state behind every token is kept: 8 (E + 1) bytes for each `prefix` router, 8 for the ids.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    is_initialized = True
    keys = None
    values = None

    def __init__(self) -> None:
        self.history: dict[str, Tensor] = {}
        """By name: (B, tokens so far, ...)."""

    def append(self, kept: dict[str, Tensor]) -> None:
        """Add what one pass leaves: (B, T, ...) by name."""
        old = self.history
        self.history = {n: torch.cat([old[n], new], dim=1) if n in old else new for n, new in kept.items()}

    def last(self, name: str) -> Tensor | None:
        """(B, ...) state behind the last token; None at the start."""
        found = self.history.get(name)
        return None if found is None or found.shape[1] == 0 else found[:, -1]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return next((tensor.shape[1] for tensor in self.history.values()), 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset, as of the keys."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in another order, or some of them several times."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some sequences."""
        self._change(lambda tensor: tensor[indices])

    def crop(self, length: int) -> None:
        """Take -``length`` tokens back; a positive number is what stays (transformers before 5.24)."""
        if length:
            self._change(lambda tensor: tensor[:, :length])

    def reset(self) -> None:
        """Forget everything."""
        self.history = {}

    def offload(self) -> None:
        """Stays where it is: it is small."""

    def prefetch(self) -> None:
        """Is there already."""

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.history = {name: change(tensor) for name, tensor in self.history.items()}


@dataclass
class Tokens:
    """The tokens of one pass and what routers leave for the next one."""

    shape: tuple[int, int]
    """B, T."""
    ids: Tensor | None
    """(B, T); None where the model was called with embeddings."""
    real: Tensor
    """(B, T) bool: no padding."""
    ends: Tensor
    """(B, T) bool: the token ends its document."""
    state: RoutingState | None
    """Of the tokens before; None: there are none."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """States behind each of these tokens."""

    @classmethod
    def read(cls, config: MocteLMConfig, features: Tensor, ids: Tensor | None, mask: Tensor | None, cache: Any):
        """Of one call.

        Args:
            config: of the model.
            features: (B, T, d) embeddings.
            ids: (B, T) or None.
            mask: (B, at least T), 0 for padding; None: no padding.
            cache: of keys and values; None: no generation.

        Raises:
            ValueError: a router cannot do without something that is not there.
        """
        shape = features.shape[:2]
        kinds = {router["kind"] for router in config.routers} if config.expert_layers else set()
        if ids is None and kinds & set(TABLES):
            raise ValueError(f"routers of the kinds {sorted(kinds & set(TABLES))} need input_ids, not inputs_embeds.")
        real = torch.ones(shape, dtype=torch.bool, device=features.device)
        if mask is not None:
            real = mask[:, -shape[1] :].to(device=features.device, dtype=torch.bool)
        ends = torch.zeros_like(real)
        if ids is not None and config.document_end_id is not None:
            ends = (ids.to(features.device) == config.document_end_id) & real
        state = None
        if cache is not None and cache.get_seq_length() > 0 and kinds & {"prefix", "previous"}:
            state = next((layer for layer in cache.layers if isinstance(layer, RoutingState)), None)
            if state is None or state.get_seq_length() != cache.get_seq_length():
                raise ValueError("the cache holds tokens that these routers have not seen; begin with an empty cache.")
        return cls(shape, ids, real, ends, state)

    def leave(self, cache: Any) -> None:
        """Put the states into the cache, behind its layers of keys and values."""
        if not self.kept or cache is None:
            return
        if self.state is None:
            self.state = RoutingState()
            cache.layers[:] = [layer for layer in cache.layers if not isinstance(layer, RoutingState)]
            cache.layers.append(self.state)
        self.state.append(self.kept)
        self.kept = {}

    def before(self) -> Tensor:
        """(B, T) id of the token before in the same document; its own id for a document's first token."""
        ids = self.ids
        carried = self.state.last("id") if self.state else None
        first = torch.full_like(ids[:, :1], -1) if carried is None else carried[:, None].to(ids.device)
        # -1: no token of this document stands before. Padding is skipped.
        own = torch.where(self.ends, -1, ids)
        place = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
        latest = torch.where(self.real, place, 0).cummax(dim=1).values
        behind = torch.cat([first, own], dim=1).gather(1, latest)
        self.kept["id"] = behind
        before = torch.cat([first, behind[:, :-1]], dim=1)
        return torch.where(before < 0, ids, before)

    def running_mean(self, name: str, values: Tensor) -> Tensor:
        """(B, T, E) mean of values over the document up to and with each token.

        Args:
            name: of the router; its sums are kept under it.
            values: (B, T, E) fp32.
        """
        # In fp64: a document's sum is the difference of two sums that may be long.
        counted = F.pad(values.double(), (0, 1), value=1.0) * self.real[..., None].to(values.device)
        total = counted.cumsum(dim=1)
        carried = self.state.last(name) if self.state else None
        if carried is not None:
            total = total + carried[:, None].to(total.device)
        ends, length = self.ends.to(values.device), values.shape[1]
        place = torch.arange(1, length + 1, device=values.device).expand(ends.shape)
        start = torch.where(ends, place, 0).cummax(dim=1).values  # behind the last end so far, this token's included
        gone = F.pad(total, (0, 0, 1, 0)).gather(1, start[..., None].expand_as(total))
        self.kept[name] = total - gone
        # The end token itself belongs to the document that it ends.
        own = F.pad(start, (1, 0))[:, :-1]
        total = total - F.pad(total, (0, 0, 1, 0)).gather(1, own[..., None].expand_as(total))
        mean = (total[..., :-1] / total[..., -1:].clamp(min=1.0)).float()
        return torch.where(self.real[..., None].to(values.device), mean, values)


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
        if router["learn"]:
            self.residual = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.learns, self.top_k, self.normalise = bool(router["learn"]), router["top_k"], router["normalise"]

    def forward(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """(B, T, k) experts of each token and weights of their outputs, None for 1; features are (B, T, d)."""
        features = features.float()
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
        return index, weight * self.scale

    def _apply(self, fn: Callable, recurse: bool = True) -> "MocteRouter":
        """Moves with the model but stays in fp32: a boundary rounded to bf16 sends tokens elsewhere."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
