"""A table of hashed pairs of tokens whose rows are added to what each layer of a model reads (`model.bigram`)."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.flops.model_sizes import layer_stack
from mocte_ds.remote_code.calls_mocte import Call, cache_in
from mocte_ds.sections import Count, Positive, Seed, parse_section, section
from mocte_ds.seeds import derived_seed

# Shapes: B sequences of T tokens, R rows, d features.

_NAME, _END = "bigrams", "end_id"


@section("model.bigram")
class Bigram:
    """Hashed-bigram embedding of a dense model; null: none."""

    rows: Count
    """Rows of the table, each as wide as the residual stream. A token reads row ((a x id of the token before) xor
    (b x its id)) mod rows; the first token of a sequence or document has one more row."""
    seed: Seed = 0
    """Of the two odd factors a and b."""
    scale: Positive = 1.0
    """What each layer's own factor of the rows is at birth; it is learned. The rows are zero at birth."""


def bigram_factors(seed: int) -> tuple[int, int]:
    """Two odd numbers below 2^31, a of the token before and b of the token."""
    a, b = (derived_seed(seed, "bigram", of) % (1 << 31) | 1 for of in ("before", "token"))
    return a, b


def bigram_rows(before: Tensor, ids: Tensor, factors: tuple[int, int], rows: int) -> Tensor:
    """Row of each token: ((a before) xor (b id)) mod R, and R where no token stands before.

    Integers below 2^62 all the way, so that every machine has the same rows.

    Args:
        before: int64 ids of the tokens before, negative where there is none.
        ids: int64 ids of the tokens, of the same shape, below 2^31.
        factors: a and b.
        rows: R.
    """
    a, b = factors
    return torch.where(before < 0, rows, torch.bitwise_xor(a * before.clamp(min=0), b * ids) % rows)


class _AddRows(nn.Module):
    """Adds the rows to what one layer reads. A module of its own, because ZeRO-3 gathers weights by module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), scale))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        return features + (self.scale * rows).to(features.device, features.dtype)


class HashedBigrams(nn.Module):
    """The table, and one factor for each layer of the model that it stands in.

    Hooks read token ids from the model's call, look the rows up beside the input embedding, and add them to the first
    argument of each layer. What begins a document, what is padding and what a cache remembers in generation is known as
    routers know it. With layers that are computed again in the backward pass, run it before the next forward pass.
    """

    def __init__(self, bigram: Bigram, end_id: int | None, hidden_size: int, layers: int) -> None:
        """Zero rows, equal factors; no random number is drawn.

        Args:
            bigram: the settings.
            end_id: token that ends a document; None: every sequence is one document.
            hidden_size: d.
            layers: how many read the rows.
        """
        super().__init__()
        self.bigram, self.end_id = bigram, end_id
        self.facts = bigram_facts(bigram, end_id)
        self.factors = bigram_factors(bigram.seed)
        # Given weights: an embedding that draws its own would change the weights that are drawn after it.
        self.table = nn.Embedding(bigram.rows + 1, hidden_size, _weight=torch.zeros(bigram.rows + 1, hidden_size))
        self.adds = nn.ModuleList(_AddRows(bigram.scale) for _ in range(layers))
        self._call: Call | None = None
        self._places: Tensor | None = None
        self._rows: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model begins without a pass, whose rows have a graph.
        return {**self.__dict__, "_call": None, "_places": None, "_rows": None}

    def follow(self, model: nn.Module) -> None:
        """Hook into a model's call, its input embedding and its layers."""
        names = list(inspect.signature(model.forward).parameters)
        model.register_forward_pre_hook(partial(self._begin, names), with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._look_up)  # type: ignore[operator]
        for number, layer in enumerate(layer_stack(model)):
            layer.register_forward_pre_hook(partial(self._add, number), with_kwargs=True)
        model.register_forward_hook(self._end)

    def _begin(self, names: list[str], _model: nn.Module, args: tuple, kwargs: dict) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        call = Call.of_call(given, args[0] if args else None, self.end_id)
        if call.ids is None:
            raise ConfigError("a model with model.bigram reads token ids: call it with input_ids=(batch, length).")
        before = call.tokens((*call.ids.shape, 1), remembers=True).before(itself=False)
        self._call, self._places = call, bigram_rows(before, call.ids, self.factors, self.bigram.rows)

    def _look_up(self, _embedding: nn.Module, _args: tuple, output: Tensor) -> None:
        assert self._places is not None
        self._rows = self.table(self._places.to(output.device))

    def _add(self, number: int, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rows = self._rows
        assert rows is not None
        if args:
            return (self.adds[number](args[0], rows), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.adds[number](kwargs["hidden_states"], rows)}

    def _end(self, _model: nn.Module, _args: tuple, output: Any) -> None:
        if self._call is not None:
            self._call.leave(cache_in(output))
        self._call = self._places = None
        if not torch.is_grad_enabled():
            self._rows = None  # else layers that are computed again read them


def bigram_facts(bigram: Bigram | None, end_id: int | None) -> dict[str, Any] | None:
    """What it takes to make a table again, in plain values.

    Args:
        bigram: the settings; None: there is no table, and nothing to say.
        end_id: token that ends a document, or None.
    """
    return None if bigram is None else {**asdict(bigram), _END: end_id}


def bigram_of(facts: Mapping[str, Any] | None) -> Bigram | None:
    """The settings in what :func:`bigram_facts` has returned."""
    return None if facts is None else parse_section(Bigram, {k: v for k, v in facts.items() if k != _END})


def put_bigrams(model: Any, facts: Mapping[str, Any] | None) -> Any:
    """Give a model of transformers the table as its part `bigrams`.

    Args:
        model: changed in place; its token ids are (B, T).
        facts: of :func:`bigram_facts`; None: the model stays as it is.

    Returns:
        The model.
    """
    bigram = bigram_of(facts)
    if bigram is not None and facts is not None:
        stack = layer_stack(model)
        bigrams = HashedBigrams(bigram, facts[_END], model.config.get_text_config().hidden_size, len(stack))
        bigrams.train(model.training)
        bigrams.follow(model)
        model.add_module(_NAME, bigrams)
    return model


def bigrams_of(model: nn.Module) -> HashedBigrams | None:
    """The table of a model, if it has one."""
    found = getattr(model, _NAME, None)
    return found if isinstance(found, HashedBigrams) else None


def with_bigrams(cls: Any, facts: Mapping[str, Any] | None) -> Any:
    """A class of transformers whose models have the table; the class itself where ``facts`` is None."""
    if facts is None:
        return cls

    def begin(self: Any, config: Any) -> None:
        cls.__init__(self, config)
        put_bigrams(self, facts)

    return type(cls.__name__, (cls,), {"__init__": begin, "__module__": cls.__module__})


def require_bigrams(facts: Any, where: object) -> None:
    """Refuse what :func:`bigram_facts` has not returned.

    Args:
        facts: of a checkpoint; None: there is no table.
        where: names it, for messages.

    Raises:
        CheckpointError: a damaged checkpoint.
    """
    try:
        bigram_of(facts)
        if facts is not None and facts[_END] is not None and type(facts[_END]) is not int:
            raise TypeError("an id is a whole number")
    except (ConfigError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: what it says of model.bigram is damaged.") from error


def refuse_bigrams(facts: Any, where: object, what: str) -> None:
    """Refuse a checkpoint with a table where nothing can take it.

    Args:
        facts: from :func:`require_bigrams`.
        where: names the checkpoint.
        what: what has no such table.

    Raises:
        CheckpointError: it has one.
    """
    if facts is not None:
        raise CheckpointError(
            f"{where} has a hashed-bigram embedding (model.bigram), which {what} cannot hold. Score it with "
            "tools/evaluate.py or go on training from its checkpoints; nothing was written."
        )
