"""What routers know of the tokens of one pass, and what they remember from pass to pass; needs torch alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B sequences of T tokens, E experts.

NO_TOKEN = -1
# What is added to an attention score to hide a key is below this; slopes by distance (ALiBi) are not.
_HIDDEN = -9e3


class RoutingError(ValueError):
    """A router lacks something that it needs to know of the tokens."""


class RoutingState:
    """What routers remember of the tokens so far: one more layer of transformers' cache.

    Beam search reorders it, batches are repeated or selected, and assisted generation crops it together with the keys
    and values, because the cache does these things to all of its layers. So that any number of tokens can be taken
    back, the state after every token is kept: 8 (E + 1) bytes for each `prefix` router, 8 for the ids.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    is_initialized = True
    keys = None
    values = None

    def __init__(self) -> None:
        self.history: dict[str, Tensor] = {}
        """By name: (B, tokens so far, ...)."""

    def append(self, kept: dict[str, Tensor]) -> None:
        """Add what one pass leaves: (B, T, ...) by name."""
        old = self.history
        self.history = {n: torch.cat([old[n], new], dim=1) if n in old else new for n, new in kept.items()}

    def last(self, name: str) -> Tensor | None:
        """(B, ...) state after the last token; None at the start."""
        found = self.history.get(name)
        return None if found is None or found.shape[1] == 0 else found[:, -1]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return next((tensor.shape[1] for tensor in self.history.values()), 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset, as of the keys."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in another order, or some of them several times."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some sequences."""
        self._change(lambda tensor: tensor[indices])

    def crop(self, length: int) -> None:
        """Take -``length`` tokens back; a positive number is what stays (transformers before 5.24)."""
        if length:
            self._change(lambda tensor: tensor[:, :length])

    def reset(self) -> None:
        """Forget everything."""
        self.history = {}

    def offload(self) -> None:
        """Stays where it is: it is small."""

    def prefetch(self) -> None:
        """Is there already."""

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.history = {name: change(tensor) for name, tensor in self.history.items()}


def state_in(cache: Any, length: int) -> RoutingState | None:
    """What routers left in a cache of keys and values; None at the start of a generation.

    Args:
        cache: of transformers, or None.
        length: tokens in it.

    Raises:
        RoutingError: the cache holds tokens that the routers have not seen.
    """
    if cache is None or not length:
        return None
    state = next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RoutingState)), None)
    if state is None or state.get_seq_length() != length:
        raise RoutingError("the cache holds tokens that these routers have not seen; begin with an empty cache.")
    return state


def given_tokens(shape: tuple[int, int], given: dict[str, Any], cached: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """What the arguments of a model's call say of padding and packing.

    Args:
        shape: B, T.
        given: arguments by name. `attention_mask` (B, tokens in the cache + T), 0 for padding, or the mask of every
            query and key, see :func:`_real`; `position_ids` (B or 1, T), where a
            real token at 0, or one that is not after the token before it, begins a document; `cu_seq_lens_q` or
            `cu_seqlens` (documents + 1,), first places of the documents in the flattened batch; `seq_idx` (B or 1, T),
            numbers of the documents. What has another shape is not read.
        cached: tokens in the cache; only with some may a mask be longer than T.

    Returns:
        (B, T) bool, False for padding, or None for none; (B, T) bool, True where a document begins, or None.
    """
    batch, length = shape
    real = _real(given.get("attention_mask"), batch, length, cached)
    begins: list[Tensor] = []
    positions, numbers = (_by_token(given.get(name), shape) for name in ("position_ids", "seq_idx"))
    if positions is not None:
        found = positions == 0
        found[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
        begins.append(found)
    if numbers is not None:
        found = torch.zeros_like(numbers, dtype=torch.bool)
        found[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        begins.append(found)
    for name in ("cu_seq_lens_q", "cu_seqlens"):
        places = given.get(name)
        if isinstance(places, Tensor) and places.dim() == 1:
            flat = torch.zeros(batch * length + 1, dtype=torch.bool, device=places.device)
            flat[places.long().clamp(max=batch * length)] = True
            begins.append(flat[:-1].view(batch, length))
    if not begins:
        return real, None
    together = begins[0]
    for other in begins[1:]:
        together = together | other.to(together.device)
    return real, together if real is None else together & real.to(together.device)


def _real(mask: Any, batch: int, length: int, cached: int) -> Tensor | None:
    """(B, T) bool, False for padding; None where the mask does not tell.

    A mask (B or 1, [heads,] T, keys) says which query sees which key: a key that no query sees is padding. Floats are
    added to the scores, so that very negative ones hide a key; integers and bools are nonzero where a query sees a
    key. Where True hides a key (Megatron), all later keys are True, and a token's own key is not.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return None
    keys = mask.shape[-1]
    if mask.dim() == 2:
        fits = mask.shape[0] == batch and (keys == length or (cached > 0 and keys > length))
        return mask[:, -length:] != 0 if fits else None
    if mask.shape[-2] != length or keys != length + cached or mask.shape[0] not in (1, batch):
        return None
    own = mask[..., -length:]
    seen = own > _HIDDEN if own.is_floating_point() else own != 0
    upper = torch.ones(length, length, dtype=torch.bool, device=seen.device).triu(1)
    diagonal = seen.diagonal(dim1=-2, dim2=-1)
    if not own.is_floating_point() and bool(seen[..., upper].all()) and not bool(diagonal[..., 1:].all()):
        seen = ~seen
    real = seen.any(dim=-2)
    real = real.any(dim=1) if mask.dim() == 4 else real
    return None if bool(real.all()) else real.expand(batch, length)


def _by_token(values: Any, shape: tuple[int, int]) -> Tensor | None:
    fits = isinstance(values, Tensor) and values.dim() == 2 and tuple(values.shape) in (shape, (1, shape[1]))
    return values.expand(shape) if fits else None


@dataclass
class Tokens:
    """The tokens of one pass, and what routers leave for the next one."""

    ids: Tensor | None = None
    """(B, T) or (n,) token ids; None where the model was called with embeddings."""
    real: Tensor | None = None
    """(B, T) bool, False for padding; None: there is none."""
    begins: Tensor | None = None
    """(B, T) bool: the token begins a document, whatever stood before it; None: every row stands alone."""
    ends: Tensor | None = None
    """(B, T) bool: the token ends its document; None: none does."""
    state: RoutingState | None = None
    """Of the tokens before; None: there are none."""
    previous: Tensor | None = None
    """(n,) what :meth:`before` gives for rows that stand alone; None: unknown."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """States after each of these tokens."""
    _carried: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        ids: Tensor | None,
        end_id: int | None,
        given: dict[str, Any],
        state: RoutingState | None = None,
        cached: int = 0,
    ) -> "Tokens":
        """Of one call.

        Args:
            shape: B, T.
            ids: (B, T) or None.
            end_id: token that ends a document, or None.
            given: arguments of the call by name, see :func:`given_tokens`.
            state: of the tokens before.
            cached: tokens in the cache of keys and values.
        """
        real, begins = given_tokens(shape, given, cached)
        if begins is None:
            begins = torch.zeros(shape, dtype=torch.bool, device=None if ids is None else ids.device)
        ends = None
        if ids is not None and end_id is not None:
            ends = ids == end_id
            ends = ends if real is None else ends & real.to(ends.device)
        return cls(ids, real, begins, ends, state)

    def leave(self, cache: Any) -> None:
        """Put the states into a cache, after its layers of keys and values."""
        if not self.kept or cache is None:
            return
        if self.state is None:
            self.state = RoutingState()
            cache.layers[:] = [layer for layer in cache.layers if not isinstance(layer, RoutingState)]
            # Masks are made for the first layer of a kind, which must not be this one.
            self.state.is_sliding = all(getattr(layer, "is_sliding", False) for layer in cache.layers)
            cache.layers.append(self.state)
        self.state.append(self.kept)
        self.kept = {}

    def before(self, keep: bool = True, itself: bool = True) -> Tensor:
        """(B, T) id of the token before in the same document; its own id for a document's first token.

        Args:
            keep: whether the last id is kept for the next pass.
            itself: False: NO_TOKEN for a document's first token.

        Raises:
            RoutingError: nothing is known of what stands before the tokens.
        """
        if self.begins is None:
            if self.previous is None:
                raise RoutingError(
                    "a router that remembers earlier tokens needs to know where sequences begin: call the model with "
                    "input_ids=(batch, length), and blocks with the features of all of these tokens."
                )
            return self.previous
        ids = self.ids
        assert ids is not None
        carried = self._last("id")
        first = torch.full_like(ids[:, :1], NO_TOKEN) if carried is None else carried[:, None].to(ids.device)
        own = ids if self.ends is None else torch.where(self.ends.to(ids.device), NO_TOKEN, ids)
        after = torch.cat([first, own], dim=1)
        if self.real is None:
            after = after[:, 1:]
        else:  # padding is skipped
            place = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
            after = after.gather(1, torch.where(self.real.to(ids.device), place, 0).cummax(dim=1).values)
        if keep:
            self.kept["id"] = after
        before = torch.cat([first, after[:, :-1]], dim=1)
        return torch.where((before < 0) | self.begins.to(ids.device), ids if itself else NO_TOKEN, before)

    def _last(self, name: str) -> Tensor | None:
        """State before the first of these tokens, also when they are computed again."""
        if name not in self._carried:
            self._carried[name] = self.state.last(name) if self.state else None
        return self._carried[name]

    def starts(self, device: torch.device) -> Tensor:
        """(B, T) bool: a document begins here, or has ended just before; padding after an end is such a place too."""
        assert self.begins is not None
        starts = self.begins.to(device)
        if self.ends is None:
            return starts
        after = torch.zeros_like(starts)
        after[:, 1:] = self.ends[:, :-1].to(device)
        return starts | after

    @torch.no_grad()
    def running_mean(self, name: str, values: Tensor) -> Tensor:
        """(B, T, E) mean of values over the document up to and with each token; padding keeps its own values.

        Args:
            name: of the router; its sums are kept under it.
            values: (B, T, E) fp32.
        """
        device, length = values.device, values.shape[1]
        # In fp64: a document's sum is the difference of two sums that may be long.
        added = F.pad(values.double(), (0, 1), value=1.0)
        real = None if self.real is None else self.real.to(device)[..., None]
        if real is not None:
            added = added * real
        carried = self._last(name)
        before = torch.zeros_like(added[:, :1]) if carried is None else carried[:, None].to(device)
        sums = torch.cat([before, added], dim=1).cumsum(dim=1)
        starts = self.starts(device)
        place = torch.where(starts, torch.arange(length, device=device).expand(starts.shape), NO_TOKEN)
        place = place.cummax(dim=1).values[..., None]
        # A document that began in this pass leaves out what stood before it.
        gone = torch.where(place < 0, 0.0, sums.gather(1, place.clamp(min=0).expand_as(added)))
        own = sums[:, 1:] - gone
        ends = None if self.ends is None else self.ends.to(device)[..., None]
        self.kept[name] = own if ends is None else torch.where(ends, 0.0, own)
        mean = (own[..., :-1] / own[..., -1:].clamp(min=1.0)).float()
        return mean if real is None else torch.where(real, mean, values)
