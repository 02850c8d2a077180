"""Routing keys: what of a token decides its expert. Each reads features, token ids or the document up to the token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.errors import MocteError
from mocte_ds.moe.context import Tokens

# Shapes: B sequences of T tokens, n = B T rows, d features, E experts, V token ids.

# A table as a prior of a learned router: the logit of its expert over the others. science: +4 ties with a fixed table.
TABLE_LOGIT = 4.0


class Key(nn.Module):
    """A routing key: token ids, features and documents in, a choice or logits out. Nothing in it is trained."""

    remembers = False
    """Whether it keeps something from pass to pass in generation."""
    name = ""
    """What that is kept under; no two keys of a model share one."""

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n,) int64 expert of each token.

        Args:
            features: (n, d) fp32.
            tokens: what else is known of them.
        """
        return self.logits(features, tokens).argmax(dim=-1)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n, E) fp32; the largest one is the choice."""
        raise MocteError(f"{type(self).__name__} has no logits.")


class LinearKey(Key):
    """`token`: the nearest cluster of the token's own feature; `random`: the same with random directions.

    logits = 2 C V^T (h - mu) - |C|^2 + prices (docs/method.md, section 4), as an (E, d) matrix and an (E,) vector.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("cluster_weight", torch.zeros(num_experts, hidden_size))
        self.register_buffer("cluster_bias", torch.zeros(num_experts))

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Store the map: (E, d) and (E,)."""
        self.cluster_weight.copy_(weight)
        self.cluster_bias.copy_(bias)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        # Never in autocast: logits that are rounded to bf16 send tokens elsewhere.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.cluster_weight, self.cluster_bias)


class PrefixKey(LinearKey):
    """`prefix`: the nearest cluster of the document's mean feature up to and with this token.

    The mean of linear logits is the logit of the mean, so E running sums a sequence are all the state: causal, the same
    in one pass or token by token, and each document of a packed sequence starts anew. Padding is left out.
    """

    remembers = True

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        own = super().logits(features, tokens)
        if tokens.begins is None:
            return own  # single rows
        return tokens.running_mean(self.name, own.view(*tokens.begins.shape, -1)).view_as(own)


class TableKey(Key):
    """`type` and `hash`: a fixed table from the token's id to its expert, made of clusters or at random."""

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("cluster_table", torch.zeros(vocab_size, dtype=torch.int64))

    def set(self, table: Tensor) -> None:
        """Store the table: (V,) expert of each token id."""
        self.cluster_table.copy_(table)

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        ids = tokens.ids
        if ids is None or ids.numel() != features.shape[0]:
            raise MocteError("a router by token ids needs them: call the model with input_ids=(batch, length).")
        return self.cluster_table[ids.reshape(-1).to(self.cluster_table.device)]

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        return TABLE_LOGIT * F.one_hot(self.choose(features, tokens), self.num_experts).float()


class PreviousKey(TableKey):
    """`previous`: a random table from the id of the token before; the first token of a document counts its own id."""

    remembers = True

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        if tokens.ids is None or tokens.ids.numel() != features.shape[0]:
            return super().choose(features, tokens)
        return self.cluster_table[tokens.before().reshape(-1).to(self.cluster_table.device)]


KINDS = ("token", "type", "prefix", "previous", "hash", "random")
TABLES = ("type", "previous", "hash")


def make_key(kind: str, hidden_size: int, num_experts: int, vocab_size: int | None) -> Key:
    """An empty key of a kind (see :data:`KINDS`)."""
    if kind in TABLES:
        table = PreviousKey if kind == "previous" else TableKey
        return table(vocab_size or 0, num_experts)
    return PrefixKey(hidden_size, num_experts) if kind == "prefix" else LinearKey(hidden_size, num_experts)
