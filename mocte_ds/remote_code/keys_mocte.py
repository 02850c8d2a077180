"""Routing keys: what of a token decides its expert, in training and in an exported model; needs torch alone.

A key says what it reads, how it is made from the clusters that a check has found (:meth:`Key.fit`), what it costs
(:meth:`Key.flops`) and whether stock classes can hold it (`stock`).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tokens_mocte import RoutingError, Tokens

# Shapes: B sequences of T tokens, n = B T rows, d features, E experts, V token ids.

# A table as a prior of a learned router: the logit of its expert over the others. science: +4 ties with a fixed table.
TABLE_LOGIT = 4.0


class Key(nn.Module):
    """A routing key: token ids, features and documents in, a choice or logits out. Nothing in it is trained.

    What it stores is buffers, so that it moves with the model, stays in its precision and is saved with a checkpoint.
    """

    reads_ids: ClassVar[bool] = False
    """Whether it reads token ids; then a model must be called with `input_ids`, and ``vocab_size`` is known."""
    has_logits: ClassVar[bool] = True
    """Whether :meth:`logits` says how near each expert is, which weight `softmax` needs; a fixed number for the chosen
    expert over the others does not."""
    remembers: ClassVar[bool] = False
    """Whether it keeps something from pass to pass in generation (:class:`Tokens`)."""
    stock: ClassVar[bool] = False
    """Whether it is a linear map of the token's own feature, which stock classes of transformers and megatron hold."""
    by_chance: ClassVar[bool] = False
    """Whether a trained router's gradient goes through it into the features. Clusters' logits are sharp: through them
    the features would get gradients many times those of the loss."""

    of_sample: ClassVar[bool] = True
    """Whether :meth:`fit` needs sampled features; a key without them can be born before the first step."""

    name = ""
    """What it is kept under in generation; no two keys of a model share one."""

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None) -> None:
        """An empty key.

        Args:
            hidden_size: d.
            num_experts: E.
            vocab_size: V; None for keys that do not read ids.
        """
        super().__init__()
        self.hidden_size, self.num_experts, self.vocab_size = hidden_size, num_experts, vocab_size or 0

    def fit(self, birth: Any) -> None:
        """Store what decides, from the clusters of the sampled features (collective).

        Args:
            birth: clusters, tables and directions of this block and bank; without a sample, random ones. Exported
                models have none.
        """
        raise NotImplementedError(f"{type(self).__name__}.fit")

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n,) int64 expert of each token.

        Args:
            features: (n, d) fp32.
            tokens: what else is known of them.
        """
        return self.logits(features, tokens).argmax(dim=-1)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n, E) fp32; the largest one is the choice."""
        raise NotImplementedError(f"{type(self).__name__}.logits")

    def learned_logits(self, features: Tensor, tokens: Tokens, residual: Tensor) -> Tensor:
        """(n, E) logits of a trained router.

        Args:
            features: (n, d) fp32.
            tokens: what else is known of them.
            residual: (E, d) fp32 linear map that is learned beside the key.
        """
        return self.logits(features if self.by_chance else features.detach(), tokens) + F.linear(features, residual)

    @classmethod
    def flops(cls, hidden_size: int, num_experts: int) -> float:
        """FLOPs per token of one choice, products of matrices only."""
        return 0.0


class LinearKey(Key):
    """`token`: the nearest cluster of the token's own feature.

    logits = 2 C V^T (h - mu) - |C|^2 + prices (docs/method.md, section 4), as an (E, d) matrix and an (E,) vector.
    """

    stock = True

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, vocab_size)
        self.register_buffer("cluster_weight", torch.zeros(num_experts, hidden_size))
        self.register_buffer("cluster_bias", torch.zeros(num_experts))

    def fit(self, birth: Any) -> None:
        self.set(*(birth.nearest_cluster(birth.tokens) if birth.tokens else birth.directions()))

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Store the map: (E, d) and (E,)."""
        self.cluster_weight.copy_(weight)
        self.cluster_bias.copy_(bias)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        # Never in autocast: logits that are rounded to bf16 send tokens elsewhere.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.cluster_weight, self.cluster_bias)

    @classmethod
    def flops(cls, hidden_size: int, num_experts: int) -> float:
        return 2.0 * num_experts * hidden_size


class TypeKey(Key):
    """`type`: a fixed table from the token's id to the cluster of the id's mean feature."""

    reads_ids, has_logits = True, False

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, vocab_size)
        self.register_buffer("cluster_table", torch.zeros(self.vocab_size, dtype=torch.int64))

    def fit(self, birth: Any) -> None:
        self.set(birth.table_of_clusters(self.vocab_size) if birth.tokens else birth.random_table(self.vocab_size))

    def set(self, table: Tensor) -> None:
        """Store the table: (V,) expert of each token id."""
        self.cluster_table.copy_(table)

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        ids = tokens.ids
        if ids is None or ids.numel() != features.shape[0]:
            raise RoutingError("a router by token ids needs them: call the model with input_ids=(batch, length).")
        return self.cluster_table[ids.reshape(-1).to(self.cluster_table.device)]

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        return TABLE_LOGIT * F.one_hot(self.choose(features, tokens), self.num_experts).float()


class PrefixKey(LinearKey):
    """`prefix`: the nearest cluster of the document's mean feature up to and including this token.

    The mean of linear logits is the logit of the mean, so E running sums per sequence are all the state: causal, the
    same in one pass or token by token, and each document of a packed sequence begins a new mean. Padding is left out.
    """

    remembers, stock = True, False

    def fit(self, birth: Any) -> None:
        rows = birth.documents or birth.tokens
        self.set(*(birth.nearest_cluster(rows) if rows else birth.directions()))

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        own = super().logits(features, tokens)
        if tokens.begins is None:
            return own  # single rows
        return tokens.running_mean(self.name, own.view(*tokens.begins.shape, -1)).view_as(own)


class PreviousKey(TypeKey):
    """`previous`: a random table from the id of the token before; the first token of a document counts its own id."""

    remembers, of_sample = True, False

    def fit(self, birth: Any) -> None:
        self.set(birth.random_table(self.vocab_size))

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        if tokens.ids is None or tokens.ids.numel() != features.shape[0]:
            return super().choose(features, tokens)
        return self.cluster_table[tokens.before().reshape(-1).to(self.cluster_table.device)]


class HashKey(TypeKey):
    """`hash`: a random table from the token's id; a baseline."""

    of_sample = False

    def fit(self, birth: Any) -> None:
        self.set(birth.random_table(self.vocab_size))


class RandomKey(LinearKey):
    """`random`: random directions of the feature, as small as Switch starts its router (Fedus et al., 2021).

    With `learn` it is the router of Switch and of sparse upcycling; a baseline.
    """

    by_chance, of_sample = True, False

    def learned_logits(self, features: Tensor, tokens: Tokens, residual: Tensor) -> Tensor:
        # One product in place of two.
        return F.linear(features, self.cluster_weight + residual, self.cluster_bias)

    def fit(self, birth: Any) -> None:
        self.set(*birth.directions(birth.router.std or (0.1 / self.hidden_size) ** 0.5))


KEYS: dict[str, type[Key]] = {
    "token": LinearKey,
    "type": TypeKey,
    "prefix": PrefixKey,
    "previous": PreviousKey,
    "hash": HashKey,
    "random": RandomKey,
}
"""The keys by their names in configs."""
