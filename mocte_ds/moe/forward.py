"""What belongs to one forward pass: its tokens, its place in the run, and what the blocks found on the way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mocte_ds.errors import MocteError
from mocte_ds.moe.observer import Observer
from mocte_ds.remote_code.calls_mocte import Call
from mocte_ds.remote_code.tokens_mocte import RoutingError, Tokens

if TYPE_CHECKING:
    from mocte_ds.moe.bank import ClusterMOELayer

# Shapes: B sequences of T tokens, n = B T rows, E experts, S sources.

_IGNORED = -100
# Sequences of a forward pass beyond the micro-batch's size (two texts a sample, for example) are numbered from here on.
BEYOND = 1 << 40


@dataclass(eq=False)
class ForwardState(Call):
    """One forward pass. It lives as long as its graph, where its recomputation finds it again.

    It holds no tensor that has a graph: the graph holds the state, and nothing would ever free the circle.
    """

    domain: Tensor | None = None
    """(B,) index of the source of each sequence, for reports only."""
    sources: int = 0
    """Number of sources that ``domain`` counts."""
    first_sequence: int = 0
    """Number of the first sequence in the run, the same however many ranks there are."""
    micro_batch: int | None = None
    """Sequences that have numbers of their own in a row; None: all."""
    observer: Observer | None = None
    """Told of the pass until it is complete; None: no observer."""
    counting: bool = False
    """Whether this pass trains: its tokens count."""
    shares: dict["ClusterMOELayer", Tensor] = field(default_factory=dict)
    """Loads that the balance loss of this pass was made with, for its recomputation."""
    usual_tokens: float | None = None
    """Tokens per forward pass in the last optimizer step, by which the balance loss is divided; None: this pass's."""
    losses: dict["ClusterMOELayer", Tensor] = field(default_factory=dict)
    """() balance losses, without a graph, that no backward pass has added yet."""
    token_count: Tensor | int | None = None
    """Tokens of this pass that count; None before the first block."""
    _counts: dict["ClusterMOELayer", Tensor] = field(default_factory=dict)
    _weights: dict["ClusterMOELayer", Tensor] = field(default_factory=dict)
    _sums: dict["ClusterMOELayer", Tensor] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    @classmethod
    def of_call(cls, given: Mapping[str, Any], first: Any, end_id: int | None) -> Self:
        """See :meth:`Call.of_call`.

        Raises:
            MocteError: padding is given in a form that is not supported.
        """
        try:
            return super().of_call(given, first, end_id)
        except RoutingError as error:
            raise MocteError(str(error)) from None

    def tokens(self, shape: torch.Size | tuple[int, ...], remembers: bool = False) -> Tokens:
        """See :meth:`Call.tokens`.

        Raises:
            MocteError: a router that remembers cannot use the cache.
        """
        try:
            return super().tokens(shape, remembers)
        except RoutingError as error:
            raise MocteError(str(error)) from None

    def counted(self, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
        """(B, T) or (n,) bool of features (..., d): False for padding; None where every token counts.

        Without an attention mask, tokens at the end of a sequence are padding if there are two or more of them, all
        with one id and the label -100. A prompt that has the label -100 is text, and counts.
        """
        tokens = self.tokens(shape)
        if tokens.real is not None:
            return tokens.real
        ids, labels = tokens.ids, self.given.get("labels")
        if ids is None or labels is None or labels.shape != ids.shape or ids.dim() != 2:
            return None
        same = (labels.to(ids.device) == _IGNORED) & (ids == ids[:, -1:])
        run = same.flip(1).long().cumprod(dim=1).flip(1)
        return (run == 0) | (run.sum(dim=1, keepdim=True) < 2)

    def sequences(self, batch: int, device: torch.device) -> Tensor:
        """(B,) int64 number of each sequence in the run."""
        return sequence_numbers(self.first_sequence, self.micro_batch, batch, device)

    def places(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where in the run the tokens of features (B, T, d) or (n, d) stand.

        Places are counted among real tokens: how far a sequence is padded depends on what it is batched with.

        Returns:
            (B, T) number of each token's sequence, (B, T) its place in it, and (B, T) False for padding or None.
        """
        counted, batch, length = self.counted(shape), 1, 1
        for size in shape[:-1]:
            length *= size
        if len(shape) == 3:
            batch, length = shape[0], shape[1]
        elif self.ids is not None and self.ids.dim() == 2 and self.ids.numel() == length:
            batch, length = self.ids.shape
        real = None if counted is None else counted.reshape(batch, length).to(device)
        sequence = self.sequences(batch, device)[:, None].expand(batch, length)
        place = torch.arange(length, device=device).expand(batch, length) if real is None else real.cumsum(dim=1) - 1
        return sequence, place, real

    def first_visit(self, block: object) -> bool:
        """Whether this is a block's first call in this pass."""
        known = id(block) in self._seen
        self._seen.add(id(block))
        return not known

    def see_features(self, features: Tensor) -> None:
        """Count this pass's tokens, at the first block."""
        if self.token_count is None:
            counted = self.counted(features.shape)
            self.token_count = features.numel() // features.shape[-1] if counted is None else counted.sum()

    def count(
        self, layer: "ClusterMOELayer", counts: Tensor, weight: Tensor | None, sums: Tensor | None = None
    ) -> None:
        """Remember what a layer of experts has counted until the pass is complete.

        Args:
            layer: which.
            counts: (E,) tokens of each expert.
            weight: () fp64 sum of the weights, or None.
            sums: (E, r) fp64 of what a key that moves has read, or None.
        """
        for kept, value in ((self._counts, counts), (self._weights, weight), (self._sums, sums)):
            if value is not None:
                kept[layer] = value if layer not in kept else kept[layer] + value

    def commit(self) -> None:
        """The pass is complete: its tokens count."""
        for layer, counts in self._counts.items():
            layer.loads.add(counts, self._weights.get(layer), self._sums.get(layer))
        self._counts, self._weights, self._sums = {}, {}, {}


def sequence_numbers(first: int, micro: int | None, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """(B,) int64 number, in the run, of each of ``batch`` sequences.

    Args:
        first: of the first one.
        micro: sequences of a micro-batch, which have numbers in a row; None: all have.
        batch: B; after ``micro`` sequences, further texts of the same samples follow.
        device: of the result.
    """
    place = torch.arange(batch, device=device)
    return first + (place if not micro else place % micro + place // micro * BEYOND)


def documents_of(tokens: Tokens, counted: Tensor | None, device: torch.device) -> Tensor:
    """(B, T) number of the document that each token belongs to, counted over the batch, ascending.

    Numbers are those of a batch without padding: what stands in front of a sequence's first real token is not counted.
    A padded token has the number of the document around it.
    """
    starts = tokens.starts(device).long()
    within = starts.cumsum(dim=1)
    real = torch.ones_like(within, dtype=torch.bool) if counted is None else counted.to(device)
    big = torch.iinfo(torch.int64).max
    least = torch.where(real, within, big).amin(dim=1, keepdim=True)
    within = torch.where(least == big, 0, (within - least).clamp(min=0))
    each = within.amax(dim=1) + 1
    first = each.cumsum(0) - each
    return within + first[:, None]


def require_domain(domain: Tensor | None, batch: int | None) -> None:
    """Refuse sources that are not those of this batch.

    Raises:
        MocteError: another number of sequences.
    """
    if domain is not None and batch is not None and tuple(domain.shape) != (batch,):
        raise MocteError(
            f"engine.mocte.annotate was given the sources of {tuple(domain.shape)} sequences, and the next forward "
            f"pass has {batch}: call annotate(domain, names) before every forward pass, with one index per sequence."
        )
