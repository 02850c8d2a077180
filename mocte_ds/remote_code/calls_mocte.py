"""One call of a model, as its routers see it: token ids, padding, packing, and the cache; needs torch alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from .tokens_mocte import RoutingError, RoutingState, Tokens, state_in

# Shapes: B sequences of T tokens, n = B T rows, d features.

_NAMED = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seqlens", "seq_idx", "labels")


@dataclass(eq=False)
class Call:
    """What the arguments of one call tell."""

    ids: Tensor | None = None
    """(B, T) or (n,) token ids; None where the model is not called with `input_ids`."""
    end_id: int | None = None
    """Token id that ends a document; None: every sequence is one document."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the call that tell of padding and packing, and its labels."""
    cache: Any = None
    """Of keys and values in generation; what routers remember travels with it."""
    cached: int = 0
    """Tokens in it before this call."""
    previous: Tensor | None = None
    """(n,) ids of the tokens before, where the ids (n,) are of rows that stand alone."""
    router_logits: list[Tensor] | None = None
    """Collects what each bank of each block compares (n, E), in the order in which they run; None: nobody asks."""
    _tokens: dict[tuple[int, ...], Tokens] = field(default_factory=dict)

    @classmethod
    def of_call(cls, given: Mapping[str, Any], first: Any, end_id: int | None) -> Self:
        """From the arguments of a model's call.

        Args:
            given: by name.
            first: the first argument, which counts as token ids where it can and nothing is called `input_ids`.
            end_id: token that ends a document.

        Raises:
            RoutingError: an attention mask that says what is padding in a form that is not read.
        """
        ids = given.get("input_ids", first)
        usable = isinstance(ids, Tensor) and ids.dim() == 2 and not torch.is_floating_point(ids)
        cache = cache_of(given.get("cache", given.get("past_key_values")))  # "cache" from transformers 5.24 on
        told = {name: given[name] for name in _NAMED if isinstance(given.get(name), Tensor)}
        mask = given.get("attention_mask")
        if isinstance(mask, Mapping):
            # One per kind of layer: a key that no query sees is padding in each of them.
            mask = mask.get("full_attention", next(iter(mask.values()), None))
            told |= {} if mask is None else {"attention_mask": mask}
        if mask is not None and not isinstance(mask, Tensor):
            raise RoutingError(
                f"attention_mask is a {type(mask).__name__}, which does not say which tokens are padding; give it as a "
                "tensor, (batch, length) or one that is added to the scores."
            )
        cached = int(cache.get_seq_length()) if cache is not None else 0
        return cls(ids if usable else None, end_id, told, cache=cache, cached=cached)

    def tokens(self, shape: torch.Size | tuple[int, ...], remembers: bool = False) -> Tokens:
        """What is known of features (B, T, d) or (n, d) of this call; the same object for all blocks.

        Some models flatten the features in front of their FFNs: if all of the call's tokens are there, they are known
        as (B, T).

        Args:
            shape: of the features.
            remembers: whether a router asks that keeps something from call to call.

        Raises:
            RoutingError: it does, and the cache is one that it cannot keep it in, or holds tokens it has not seen.
        """
        place, ids = tuple(shape[:-1]), self.ids
        if len(place) != 2 and ids is not None and ids.dim() == 2 and ids.numel() == math.prod(place):
            place = tuple(ids.shape)
        found = self._tokens.get(place)
        if found is None:
            found = self._tokens[place] = self._read(place)
        if remembers and self.cache is not None and found.begins is not None and found.state is None:
            found.state = self._remembered()
        return found

    def _read(self, place: tuple[int, ...]) -> Tokens:
        ids = self.ids
        if len(place) != 2:
            fits = ids is not None and ids.numel() == math.prod(place)
            return Tokens(ids, previous=self.previous) if fits else Tokens()
        if ids is not None and tuple(ids.shape) != place:
            ids = None
        return Tokens.of((place[0], place[1]), ids, self.end_id, dict(self.given), cached=self.cached)

    def _remembered(self) -> RoutingState | None:
        if getattr(self.cache, "is_compileable", False):
            raise RoutingError(
                "routers that remember earlier tokens cannot keep their state in a static cache; generate with "
                "cache_implementation 'dynamic'."
            )
        try:
            return state_in(self.cache, self.cached)
        except RoutingError as error:
            raise RoutingError(f"generation with routers that remember earlier tokens: {error}") from None

    def leave(self, cache: Any) -> None:
        """Put what routers remember into the cache that the call has used, if there is one."""
        cache = cache_of(cache) if self.cache is None else self.cache
        for tokens in self._tokens.values():
            if cache is not None and hasattr(cache, "layers"):
                tokens.leave(cache)
            tokens.kept = {}
        self.cache = None  # its keys and values have the graph that may hold this call


def cache_of(cache: Any) -> Any:
    """The cache that grows with the tokens: an encoder-decoder has one more, of the encoder's."""
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if hasattr(cache, "get_seq_length") else None


def cache_in(output: Any) -> Any:
    """The cache that a call has left in its output, or None."""
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)
