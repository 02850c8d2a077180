"""Routing keys that read the token before and the token, in training and in an exported model; needs torch alone."""

from typing import Any

import torch
from torch import Tensor

from .keys_mocte import TableKey, renumbered
from .tokens_mocte import Tokens

# Shapes: n tokens, V token ids, R rows.

PRIME = (1 << 31) - 1


def pair_rows(before: Tensor, ids: Tensor, factors: Tensor, rows: int) -> Tensor:
    """Row of each pair of tokens: ((a before + b id) mod p) mod R with p = 2^31 - 1 (Carter and Wegman, 1979).

    Integers below 2^63 all the way, so that every machine has the same rows. For random a and b any two pairs share a
    row with a probability of about 1 / R.

    Args:
        before: int64 ids of the tokens before.
        ids: int64 ids of the tokens, of the same shape.
        factors: (2,) int64 a and b, from 1 to p - 1.
        rows: R.
    """
    a, b = factors.to(ids.device)
    return (a * before + b * ids) % PRIME % rows


class PairHashKey(TableKey):
    """`pair-hash`: a random table of the hashed pair of the token before and the token; a baseline.

    The first token of a document counts its own id as the one before.
    """

    remembers, of_sample = True, False
    settings = (*TableKey.settings, "rows")

    def __init__(
        self, hidden_size: int, num_experts: int, vocab_size: int | None = None, rows: int = 1 << 16, **settings: Any
    ) -> None:
        """An empty key; ``rows``: R."""
        super().__init__(hidden_size, num_experts, vocab_size, **settings)
        self.register_buffer("cluster_pairs", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("cluster_factors", torch.ones(2, dtype=torch.int64))

    def fit_table(self, birth: Any) -> None:
        self.set(birth.random_integers(2, 1, PRIME), birth.random_table(len(self.cluster_pairs)))

    def set(self, factors: Tensor, pairs: Tensor) -> None:
        """Store (2,) factors of the hash and (R,) expert of each row."""
        self.cluster_factors.copy_(factors)
        self.cluster_pairs.copy_(pairs)

    def renumber(self, order: Tensor) -> None:
        self.cluster_pairs.copy_(renumbered(self.cluster_pairs, order))

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        ids = self.ids(features, tokens)
        rows = pair_rows(tokens.before().reshape(-1), ids, self.cluster_factors, len(self.cluster_pairs))
        return self.cluster_pairs[rows.to(self.cluster_pairs.device)]


class PairKey(PairHashKey):
    """`pair`: a table from the hashed pair to the cluster of its mean feature; others take the token's own."""

    of_sample = True

    def __init__(
        self, hidden_size: int, num_experts: int, vocab_size: int | None = None, rows: int = 1 << 16, **settings: Any
    ) -> None:
        """An empty key; ``rows``: R."""
        super().__init__(hidden_size, num_experts, vocab_size, rows, **settings)
        self.register_buffer("cluster_table", torch.zeros(self.vocab_size, dtype=torch.int64))

    def fit_table(self, birth: Any) -> None:
        rows, factors = len(self.cluster_pairs), birth.random_integers(2, 1, PRIME)
        if birth.tokens:
            of_ids, of_pairs = birth.tables_of_pairs(
                lambda before, ids: pair_rows(before, ids, factors, rows), self.vocab_size, rows
            )
        else:
            of_ids, of_pairs = birth.random_table(self.vocab_size), birth.random_table(rows)
        self.set(factors, of_pairs)
        self.cluster_table.copy_(of_ids)

    def renumber(self, order: Tensor) -> None:
        super().renumber(order)
        self.cluster_table.copy_(renumbered(self.cluster_table, order))

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        found = super().choose(features, tokens)
        own = self.cluster_table[self.ids(features, tokens).to(self.cluster_table.device)]
        return torch.where(found < 0, own, found)
