"""Rows that the trainability of the experts is measured on: the same ones however many ranks share the batch."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocte_ds.dist.collectives import stack_over_ranks, sum_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.seeds import derived_seed
from mocte_ds.spectrum.sample import Selection, hash_keys

# Shapes: T tokens of a micro-batch on this rank, k experts per token, E experts of a bank, n rows per expert, d
# features.

_AT_ONCE = 1 << 24
"""Numbers of merged rows that travel together: 64 MiB."""
_NO_HASH = torch.iinfo(torch.int64).max


class Wanted(NamedTuple):
    """An expert whose rows :func:`merged_rows` is asked for."""

    rows: "ExpertRows"
    """Of its bank; those of all experts that are asked for together keep equally many."""
    expert: int
    """Its number in its bank."""
    width: int
    """d."""


class ExpertRows:
    """For each expert of a bank, the rows with the smallest seeded hashes of (sequence, position) in a window of steps.

    A rank chooses among the tokens that it sends, before they travel: it knows their places, and the experts' exchange
    carries nothing more. What all ranks have kept holds the n smallest of all, whatever the number of ranks, `ep_size`
    and micro-batches.
    """

    def __init__(self, experts: int, rows: int, seed: int) -> None:
        """Nothing is kept yet.

        Args:
            experts: E.
            rows: n.
            seed: of the choice.
        """
        self.experts, self.count = experts, rows
        # Apart from the spectrum's sample, which hashes the same places.
        self.seed = derived_seed(seed, "rows of experts")
        self._marked: tuple[list[Tensor | None], list[Selection]] = [], []
        self._replaced: list[tuple[Tensor, Tensor, Tensor]] | None = None
        """Since :meth:`mark`: of what, which rows, and what they were; None: nothing is marked."""
        self.clear()

    def clear(self) -> None:
        """Forget all rows, so that the next window shows today's weights; what is marked stays marked."""
        # One rank may send all of an expert's tokens, so that each keeps as many as all do together.
        self._chosen = [Selection(self.count, self.seed) for _ in range(self.experts)]
        self._kept: list[Tensor | None] = [None] * self.experts

    def mark(self) -> None:
        """Remember the rows, for :meth:`take_back`."""
        self._marked, self._replaced = (list(self._kept), self._chosen), []
        for chosen in self._chosen:
            chosen.mark()

    def take_back(self) -> None:
        """Put back what entered since :meth:`mark`."""
        for kept, slots, rows in reversed(self._replaced or []):
            kept[slots] = rows
        kept, self._chosen = self._marked
        self._kept, self._replaced = list(kept), []
        for chosen in self._chosen:
            chosen.take_back()

    @torch.no_grad()
    def offer(
        self, features: Tensor, index: Tensor, sequence: Tensor, place: Tensor, counts: Tensor | None = None
    ) -> None:
        """Take what belongs to the sample of a micro-batch.

        Args:
            features: (T, d).
            index: (T, k) int64 experts of each token.
            sequence: T numbers, of each token's sequence in the run.
            place: T numbers, of its place in the sequence.
            counts: T booleans, False for padding; None: all are tokens.
        """
        keys = hash_keys(sequence.reshape(-1), place.reshape(-1), self.seed)
        for expert in range(self.experts):
            mine = (index == expert).any(dim=1)
            if counts is not None:
                mine &= counts.reshape(-1).to(mine.device)
            place = mine.nonzero()[:, 0]
            update = self._chosen[expert].offer(keys[place]) if len(place) else None
            if update is None:
                continue
            kept = self._kept[expert]
            if kept is None:
                kept = self._kept[expert] = features.new_empty(self.count, features.shape[1])
            if self._replaced is not None:
                self._replaced.append((kept, update.slots, kept[update.slots]))
            kept[update.slots] = features.detach()[place[update.take]].to(kept.dtype)

    def hashes(self, expert: int) -> Tensor:
        """(m,) ascending hashes of an expert's rows on this rank."""
        return self._chosen[expert].hashes

    def first(self, expert: int, count: int) -> Tensor:
        """(count, d) the rows of an expert on this rank with the smallest hashes; it has that many, at least one."""
        kept = self._kept[expert]
        assert kept is not None
        return kept[self._chosen[expert].slots[:count].to(kept.device)]

    def counts(self) -> Tensor:
        """(E,) rows of each expert on this rank."""
        return torch.tensor([len(chosen.slots) for chosen in self._chosen])

    def state_dict(self) -> dict[str, Any]:
        """Plain values of this rank, for a checkpoint between two checks."""
        rows = [
            kept if kept is None else kept[: len(c.slots)] for kept, c in zip(self._kept, self._chosen, strict=True)
        ]
        return {"chosen": [chosen.state_dict() for chosen in self._chosen], "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what :meth:`state_dict` returned; rows go to ``device``."""
        self.clear()
        for chosen, values in zip(self._chosen, state["chosen"], strict=True):
            chosen.load_state_dict(values)
        for expert, rows in enumerate(state["rows"]):
            if rows is not None:
                kept = self._kept[expert] = rows.new_empty(self.count, rows.shape[1], device=device)
                kept[: len(rows)] = rows


def found_rows(samples: Sequence[ExpertRows], axis: Axis) -> list[list[int]]:
    """Rows of each expert of each bank over all ranks, at most n, in one exchange (collective)."""
    if not samples:
        return []
    own = [rows.counts() for rows in samples]
    parts = sum_over_ranks(torch.cat(own), axis).split([len(part) for part in own])
    return [part.clamp(max=rows.count).tolist() for rows, part in zip(samples, parts, strict=True)]


def merged_rows(wanted: Sequence[Wanted], device: torch.device, axis: Axis) -> Iterator[Tensor]:
    """The chosen rows of all ranks in the order of their hashes, on every rank, one expert after the other.

    Two exchanges for as many experts as fit into 64 MiB. Collective: all ranks must ask for the same experts and take
    all that is given.

    Args:
        wanted: experts that have n rows over all ranks (:func:`found_rows`).
        device: of the results.
        axis: the ranks.

    Yields:
        (n, d) fp32 of each expert.
    """
    for width, group in groupby(wanted, key=lambda one: one.width):
        alike = list(group)
        step = max(1, _AT_ONCE // (alike[0].rows.count * width))
        for start in range(0, len(alike), step):
            yield from _merged(alike[start : start + step], device, axis)


def _merged(wanted: Sequence[Wanted], device: torch.device, axis: Axis) -> Tensor:
    n = wanted[0].rows.count
    own = torch.full((len(wanted), n), _NO_HASH)
    for line, one in zip(own, wanted, strict=True):
        hashes = one.rows.hashes(one.expert)
        line[: len(hashes)] = hashes
    everywhere = stack_over_ranks(own, axis).transpose(0, 1).flatten(1)
    owner = everywhere.sort(dim=1, stable=True).indices[:, :n] // n
    result = torch.zeros(len(wanted), n, wanted[0].width, device=device)
    for line, owned, one in zip(result, owner, wanted, strict=True):
        # A rank's own hashes are in ascending order: its i-th row among the chosen ones is its i-th row.
        mine = (owned == axis.rank).nonzero()[:, 0]
        if len(mine):
            line[mine.to(device)] = one.rows.first(one.expert, len(mine)).to(device, line.dtype)
    # Nobody else has anything but zeros where a rank has a row, so that the sum is that row, bit for bit.
    return sum_over_ranks(result, axis)
