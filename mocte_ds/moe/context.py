"""What the blocks of a model must know of the current batch besides the features: token ids, documents, positions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Tokens:
    """What a gate may know of the tokens whose features it routes; B sequences of T tokens."""

    ids: Tensor | None = None
    """(B, T) or (n,) token ids."""
    document: Tensor | None = None
    """(B, T) number of the document each token belongs to, ascending in a sequence; None: every row stands alone."""
    eod_id: int | None = None
    """Token id that ends a document."""
    memory: dict[str, Any] | None = None
    """In generation, what this gate keeps from call to call; None: nothing is carried on."""
    continues: bool = False
    """Whether these tokens follow on those of the last call (generation with a cache)."""


@dataclass
class BatchContext:
    """The current micro-batch; one object is shared by all blocks of a model."""

    eod_id: int | None = None
    """Token id that ends a document; None: every sequence is one document."""
    token_ids: Tensor | None = None
    """(B, T) ids, or None where the model is not called with `input_ids`."""
    domain: Tensor | None = None
    """(B,) index of the source of each sequence, for reports only."""
    sources: int = 0
    """Number of sources that ``domain`` counts."""
    first_sequence: int = 0
    """Number of this micro-batch's first sequence in the run, the same however many ranks there are."""
    micro_step: int = 0
    """Counts micro-batches; tells a block that a forward is a recomputation of one it has already seen."""
    sampling: bool = False
    """True while the controller wants features."""
    recording: bool = False
    """True while the controller wants to know which expert each token takes."""
    groups: Tensor | None = None
    """(B, T) number of a group for each token, whose way to the experts is recorded too; None: nobody asks."""
    continues: bool = False
    """True in a call that goes on with cached keys and values."""
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What each gate keeps from call to call in generation."""

    def follow(self, model: nn.Module) -> None:
        """Take `input_ids` from every call of ``model`` (keyword, or first positional integer tensor)."""

        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            usable = isinstance(ids, Tensor) and ids.dim() == 2 and not torch.is_floating_point(ids)
            self.token_ids = ids if usable else None
            cache = kwargs.get("cache", kwargs.get("past_key_values"))  # "cache" from transformers 5.24 on
            self.continues = not module.training and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0
            if not self.continues:
                self.memories = {}

        model.register_forward_pre_hook(read, with_kwargs=True)

    def tokens(self, shape: torch.Size, gate: nn.Module) -> Tokens:
        """What is known of features (B, T, d) or (n, d) of this batch that ``gate`` is about to route."""
        ids = self.token_ids
        if len(shape) != 3:
            return Tokens(ids, None, self.eod_id)
        if ids is not None and ids.shape != shape[:2]:
            ids = None
        device = ids.device if ids is not None else torch.device("cpu")
        document = self.documents(self.eod_id, shape[0], shape[1], device)
        memory = None if gate.training else self.memories.setdefault(id(gate), {})
        return Tokens(ids, document, self.eod_id, memory, self.continues)

    def documents(self, eod_id: int | None, batch: int, length: int, device: torch.device) -> Tensor:
        """(B, T) number of the document each token belongs to, counted over the micro-batch.

        A document ends with ``eod_id``; without token ids or ``eod_id`` every sequence is one document.
        """
        rows = torch.arange(batch, device=device)[:, None]
        if eod_id is None or self.token_ids is None or self.token_ids.shape != (batch, length):
            return rows.expand(batch, length)
        ends = (self.token_ids == eod_id).to(torch.int64)
        within = ends.cumsum(dim=1) - ends  # the end token belongs to the document that it ends
        starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), within[:, -1].add(1).cumsum(0)[:-1]])
        return within + starts[:, None]
