"""Collects, in the ordinary forward passes, the features that a check reads: single tokens and means of documents."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mocte_ds.dist.collectives import world
from mocte_ds.moe.context import BatchContext
from mocte_ds.spectrum.sample import Reservoir, hash_keys

# A shorter stretch of a document says more about its last words than about its source.
MIN_DOCUMENT_TOKENS = 16
_POSITIONS = 1 << 24


class FeatureCollector:
    """The sampled features of one block on this rank, the same rows however many ranks share the batch.

    Shapes: B sequences of T tokens with d features.
    """

    def __init__(
        self, hidden_size: int, rows: int, documents: int, seed: int, eod_id: int | None, doublings: int = 0
    ) -> None:
        """Make empty reservoirs.

        Args:
            hidden_size: d.
            rows: token features of a sample over all ranks.
            documents: document means kept over all ranks.
            seed: seed of the sampling hash.
            eod_id: token that ends a document.
            doublings: how often the sample may be doubled; so many more rows are kept.
        """
        ranks = world()[1]
        self._sample_rows = rows
        self._tokens = Reservoir(rows << doublings, hidden_size + 2, seed, ranks=ranks)
        self._documents = Reservoir(documents, hidden_size + 1, seed, ranks=ranks)
        self._seed, self._eod_id = seed, eod_id

    @torch.no_grad()
    def see(self, features: Tensor, context: BatchContext) -> None:
        """Take what the sample wants of one micro-batch.

        Args:
            features: (B, T, d), or (T, d) for one sequence.
            context: token ids, sources and place of the micro-batch in the run.
        """
        features = features[None] if features.dim() == 2 else features
        batch, length, width = features.shape
        device = features.device
        sequence = context.first_sequence + torch.arange(batch, device=device)
        position = torch.arange(length, device=device)
        keys = hash_keys(sequence[:, None].expand(batch, length), position.expand(batch, length), self._seed)
        ids = context.token_ids if context.token_ids is not None else torch.full((batch, length), -1, device=device)
        flat = features.reshape(-1, width)
        unknown = torch.full((batch,), -1, device=device)
        domain = context.domain.to(device) if context.domain is not None else unknown
        source = domain[:, None].expand(batch, length)
        self._tokens.add(_with_columns(flat, ids.reshape(-1), source.reshape(-1)), keys.reshape(-1))

        document = context.documents(self._eod_id, batch, length, device).reshape(-1)
        count = int(document[-1]) + 1
        sums = torch.zeros(count, width, device=device).index_add_(0, document, flat.float())
        tokens = torch.bincount(document, minlength=count)
        owner = torch.zeros(count, dtype=torch.int64, device=device)
        owner[document] = torch.arange(batch, device=device).repeat_interleave(length)
        long_enough = tokens >= MIN_DOCUMENT_TOKENS
        means = _with_columns(sums / tokens.clamp(min=1)[:, None], domain[owner])
        place = torch.arange(count, device=device)
        first = torch.full((batch,), count, device=device).scatter_reduce(0, owner, place, "amin")
        keys = hash_keys(sequence[owner], _POSITIONS + place - first[owner], self._seed)
        self._documents.add(means[long_enough], keys[long_enough])

    def tokens(self, doubled: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's share of the token sample: features (n, d), token ids (n,), sources (n,); -1 where unknown.

        Args:
            doubled: how often the sample is doubled; a larger one holds the smaller one's rows.
        """
        rows = self._tokens.merged_rows(count=self._sample_rows << doubled)
        return rows[:, :-2], _as_ids(rows[:, -2]), _as_ids(rows[:, -1])

    def documents(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the document sample: means (m, d) and their sources (m,), -1 where unknown."""
        rows = self._documents.merged_rows()
        return rows[:, :-1], _as_ids(rows[:, -1])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """This rank's rows, for a checkpoint between two checks."""
        return {"tokens": self._tokens.state_dict(), "documents": self._documents.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._tokens.load_state_dict(state["tokens"])
        self._documents.load_state_dict(state["documents"])

    def clear(self) -> None:
        """Forget everything, so that the next check reads the features of its own weights."""
        self._tokens.clear()
        self._documents.clear()


def _with_columns(rows: Tensor, *columns: Tensor) -> Tensor:
    return torch.cat([rows.float(), *(column[:, None].float() for column in columns)], dim=1)


def _as_ids(column: Tensor) -> Tensor:
    return column.round().to(torch.int64)
