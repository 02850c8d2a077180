"""What the blocks of a model must know of the current batch besides the features: token ids, documents, positions."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class BatchContext:
    """The current micro-batch; one object is shared by all blocks of a model."""

    token_ids: Tensor | None = None
    """(B, T) ids, or None where the model is not called with `input_ids`."""
    domain: Tensor | None = None
    """(B,) index of the source of each sequence, for reports only."""
    first_sequence: int = 0
    """Number of this micro-batch's first sequence in the run, the same however many ranks there are."""
    micro_step: int = 0
    """Counts micro-batches; tells a block that a forward is a recomputation of one it has already seen."""
    sampling: bool = False
    """True while the controller wants features."""

    def follow(self, model: nn.Module) -> None:
        """Take `input_ids` from every call of ``model`` (keyword, or first positional integer tensor)."""

        def read(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            usable = isinstance(ids, Tensor) and ids.dim() == 2 and not torch.is_floating_point(ids)
            self.token_ids = ids if usable else None

        model.register_forward_pre_hook(read, with_kwargs=True)

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
