"""Routing keys: what of a token decides its expert, in training and in an exported model; needs torch alone.

A key says what it reads, how it is made from the clusters that a check has found (:meth:`Key.fit`), what it costs
(:meth:`Key.flops`) and whether stock classes can hold it (`stock`).
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tokens_mocte import RoutingError, Tokens

# Shapes: B sequences of T tokens, n = B T rows, d features, E experts, V token ids.


def accepted(function: Callable, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the names that a function takes as arguments."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return names
    return tuple(name for name in names if name in parameters)


def renumbered(table: Tensor, order: Tensor) -> Tensor:
    """A table of experts (...) whose numbers so far were ``order`` (E,); -1 stays."""
    new = torch.empty_like(order)
    new[order] = torch.arange(len(order), device=order.device)
    return torch.where(table < 0, table, new[table.clamp(min=0)])


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

    moves: ClassVar[bool] = False
    """Whether each optimizer step moves it by the tokens that its experts had: :meth:`take_sums` and :meth:`follow`.
    Its choice adds a buffer `cluster_bias` (E,), which `balance_rate` moves."""
    counting = False
    """Whether the tokens of the next choice count, so that :meth:`take_sums` follows: not in evaluation, and not in a
    recomputation, which may end right after the choice."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Names of the router's settings that its constructor and :meth:`flops` are given, by name, if they take them."""

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

    @classmethod
    def of(cls, router: Any, hidden_size: int, num_experts: int, vocab_size: int | None) -> Self:
        """An empty key with the settings of its router; other arguments as of the class."""
        # Configs of older exports lack settings that are new; the constructor's defaults are what was then.
        known = {name: getattr(router, name) for name in cls.taken() if hasattr(router, name)}
        return cls(hidden_size, num_experts, vocab_size, **known)

    @classmethod
    def taken(cls) -> tuple[str, ...]:
        """The settings that the constructor takes; one that was written for fewer has the defaults of the others."""
        return accepted(cls.__init__, cls.settings)

    def fit(self, birth: Any) -> None:
        """Store what decides, from the clusters of the sampled features (collective).

        Args:
            birth: clusters, tables and directions of this block and bank; without a sample, random ones. Exported
                models have none.
        """
        raise NotImplementedError(f"{type(self).__name__}.fit")

    def renumber(self, order: Tensor) -> None:
        """Give the experts other numbers, so that ranks get even loads; for keys whose loads stay as at birth.

        Args:
            order: (E,) int64, the number so far of each expert.
        """
        raise NotImplementedError(f"{type(self).__name__}.renumber")

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

    def learned_logits(self, features: Tensor, tokens: Tokens, residual: Tensor, **learned: Tensor) -> Tensor:
        """(n, E) logits of a trained router.

        Args:
            features: (n, d) fp32.
            tokens: what else is known of them.
            residual: (E, d) fp32 linear map that is learned beside the key.
            **learned: what else is, for keys that have such settings.
        """
        return self.logits(features if self.by_chance else features.detach(), tokens) + F.linear(features, residual)

    def no_sums(self) -> Tensor:
        """What :meth:`take_sums` returns of no tokens; for keys that move."""
        raise NotImplementedError(f"{type(self).__name__}.no_sums")

    def take_sums(self, index: Tensor, real: Tensor | None) -> Tensor:
        """Sums over the tokens of each expert in the choice that was just made; for keys that move.

        Args:
            index: (n, k) experts of each token.
            real: (n,) bool, False for padding; None: every token counts.

        Returns:
            (E, ...) fp64 of what :meth:`follow` needs.
        """
        raise NotImplementedError(f"{type(self).__name__}.take_sums")

    def follow(self, sums: Tensor, load: Tensor) -> None:
        """Move by an optimizer step; for keys that move.

        Args:
            sums: of :meth:`take_sums` over the step, all ranks together.
            load: (E,) int64 tokens of each expert.

        Raises:
            RoutingError: the sums are not finite.
        """
        raise NotImplementedError(f"{type(self).__name__}.follow")

    @classmethod
    def flops(cls, hidden_size: int, num_experts: int, **settings: Any) -> float:
        """FLOPs per token of one choice, products of matrices only; ``settings`` as of the class."""
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
    def flops(cls, hidden_size: int, num_experts: int, **settings: Any) -> float:
        return 2.0 * num_experts * hidden_size


class TableKey(Key):
    """A fixed table of what token ids tell; as the prior of a trained router it can name groups of experts."""

    reads_ids, has_logits = True, False
    settings: ClassVar[tuple[str, ...]] = ("prior", "groups", "std")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        vocab_size: int | None = None,
        prior: float = 4.0,
        groups: int | None = None,
        std: float | None = None,
    ) -> None:
        """An empty table.

        Args:
            hidden_size: d.
            num_experts: E.
            vocab_size: V.
            prior: logit of the table's experts over the others.
            groups: entries go up to this; experts are dealt out to them in order. None: one for each expert.
            std: standard deviation of random directions that a trained router starts with; None: it starts at zero.
        """
        super().__init__(hidden_size, num_experts, vocab_size)
        self.prior, self.groups = prior, groups or num_experts
        self.has_start = std is not None
        if self.has_start:
            self.register_buffer("cluster_start", torch.zeros(num_experts, hidden_size))

    def fit(self, birth: Any) -> None:
        self.fit_table(birth)
        if self.has_start:
            self.cluster_start.copy_(birth.directions(birth.router.std)[0])

    def fit_table(self, birth: Any) -> None:
        """Store the table; see :meth:`fit`."""
        raise NotImplementedError(f"{type(self).__name__}.fit_table")

    def ids(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n,) int64 ids of the tokens.

        Raises:
            RoutingError: there are none.
        """
        ids = tokens.ids
        if ids is None or ids.numel() != features.shape[0]:
            raise RoutingError("a router by token ids needs them: call the model with input_ids=(batch, length).")
        return ids.reshape(-1)

    def marks(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n, E) fp32: 1 for the experts of the token's group, 0 for others."""
        group = torch.arange(self.num_experts, device=features.device) * self.groups // self.num_experts
        return (self.choose(features, tokens).to(features.device)[:, None] == group).float()

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        return self.prior * self.marks(features, tokens)

    def learned_logits(self, features: Tensor, tokens: Tokens, residual: Tensor, **learned: Tensor) -> Tensor:
        matrix = self.cluster_start + residual if self.has_start else residual
        prior = learned.get("prior", self.prior)
        return prior * self.marks(features, tokens) + F.linear(features, matrix)


class TypeKey(TableKey):
    """`type`: a fixed table from the token's id to the cluster of the id's mean feature."""

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None, **settings: Any) -> None:
        super().__init__(hidden_size, num_experts, vocab_size, **settings)
        self.register_buffer("cluster_table", torch.zeros(self.vocab_size, dtype=torch.int64))

    def fit_table(self, birth: Any) -> None:
        self.set(birth.table_of_clusters(self.vocab_size) if birth.tokens else birth.random_table(self.vocab_size))

    def set(self, table: Tensor) -> None:
        """Store the table: (V,) expert of each token id."""
        self.cluster_table.copy_(table)

    def renumber(self, order: Tensor) -> None:
        self.set(renumbered(self.cluster_table, order))

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        return self.cluster_table[self.ids(features, tokens).to(self.cluster_table.device)]


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
            tokens.before()  # refuses rows that are not known to stand alone
            return own
        return tokens.running_mean(self.name, own.view(*tokens.begins.shape, -1)).view_as(own)


class PreviousKey(TypeKey):
    """`previous`: a random table from the id of the token before; the first token of a document counts its own id."""

    remembers, of_sample = True, False

    def fit_table(self, birth: Any) -> None:
        self.set(birth.random_table(self.vocab_size))

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        self.ids(features, tokens)  # refuses where there are none
        return self.cluster_table[tokens.before().reshape(-1).to(self.cluster_table.device)]


class HashKey(TypeKey):
    """`hash`: a random table from the token's id; a baseline."""

    of_sample = False

    def fit_table(self, birth: Any) -> None:
        self.set(birth.random_table(self.vocab_size))


class RandomKey(LinearKey):
    """`random`: random directions of the feature, as small as Switch starts its router (Fedus et al., 2021).

    With `learn` it is the router of Switch and of sparse upcycling; a baseline.
    """

    by_chance, of_sample = True, False

    def learned_logits(self, features: Tensor, tokens: Tokens, residual: Tensor, **learned: Tensor) -> Tensor:
        # One product in place of two.
        return F.linear(features, self.cluster_weight + residual, self.cluster_bias)

    def fit(self, birth: Any) -> None:
        self.set(*birth.directions(birth.router.std or (0.1 / self.hidden_size) ** 0.5))
