"""The sampled features of a block, as a routing key is made of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mocte_ds.dist.collectives import gather_rows
from mocte_ds.dist.mesh import Axis

# Shapes: n tokens and m documents of this rank, d features, k directions.


class TokenRows(NamedTuple):
    """This rank's sampled tokens; of what is not known -1."""

    features: Tensor
    """(n, d)."""
    ids: Tensor
    """(n,)."""
    sources: Tensor
    """(n,)."""
    before: Tensor
    """(n,) ids of the tokens before, in their documents."""
    documents: Tensor
    """(n,) numbers of their documents in the run; a document that a sequence's end has cut counts as two."""

    @classmethod
    def none(cls, width: int) -> "TokenRows":
        """Of no tokens with ``width`` features."""
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(torch.empty(0, width), nothing, nothing, nothing, nothing)


@dataclass(frozen=True)
class Rows:
    """Features of this rank and the leading directions of all ranks' features."""

    features: Tensor
    """(n, d)."""
    basis: Tensor
    """(d, k) orthonormal."""
    mean: Tensor
    """(d,) mean of all ranks' features."""
    order: Tensor | None = None
    """(rows of all ranks,) order of the gathered rows by their hashes; None: they stay in the order of the ranks."""

    def coordinates(self, axis: Axis, basis: Tensor | None = None) -> Tensor:
        """(rows of all ranks, k) coordinates in ``basis``; None: in its own (collective)."""
        return self.gathered((self.features - self.mean) @ (self.basis if basis is None else basis), axis)

    def gathered(self, rows: Tensor, axis: Axis) -> Tensor:
        """Something of each row, of all ranks (collective)."""
        everywhere = gather_rows(rows, axis)
        return everywhere if self.order is None else everywhere[self.order.to(everywhere.device)]


@dataclass(frozen=True)
class FeatureSample:
    """What a gate is made of."""

    tokens: Rows
    """Single tokens."""
    token_ids: Tensor
    """(n,) their ids; -1 where unknown."""
    documents: Rows | None = None
    """Means of documents; None where none was sampled."""
    ids_before: Tensor | None = None
    """(n,) ids of the tokens before, in their documents; None: unknown."""
    documents_of_tokens: Tensor | None = None
    """(n,) numbers of their documents in the run; None: unknown."""
