"""Rows that the trainability of the experts is measured on: the same ones however many ranks share the batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mocte_ds.dist.collectives import gather_rows, sum_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.seeds import derived_seed
from mocte_ds.spectrum.sample import Selection, hash_keys

# Shapes: T tokens of a micro-batch on this rank, k experts per token, E experts of a bank, n rows per expert, d
# features.


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

    def found(self, axis: Axis) -> list[int]:
        """Rows of each expert over all ranks, at most n (collective)."""
        own = torch.tensor([len(chosen.slots) for chosen in self._chosen])
        return sum_over_ranks(own, axis).clamp(max=self.count).tolist()

    def merged(self, experts: list[int], width: int, device: torch.device, axis: Axis) -> Tensor:
        """The chosen rows of all ranks in the order of their hashes, on every rank (collective).

        Args:
            experts: that have n rows (see :meth:`found`); the same on all ranks.
            width: d.
            device: of the result.
            axis: the ranks.

        Returns:
            (len(experts), n, d) fp32.
        """
        rows = torch.zeros(len(experts), self.count, width, device=device)
        for number, expert in enumerate(experts):
            chosen, kept = self._chosen[expert], self._kept[expert]
            hashes = chosen.hashes.cpu()
            everywhere, order = gather_rows(hashes, axis).sort(stable=True)
            owner = gather_rows(torch.full_like(hashes, axis.rank), axis)[order][: self.count]
            # A rank's own hashes are in ascending order: its i-th row among the chosen ones is its i-th row.
            mine = (owner == axis.rank).nonzero()[:, 0]
            if kept is not None and len(mine):
                rows[number, mine.to(device)] = kept[chosen.slots[: len(mine)].to(kept.device)].to(device, rows.dtype)
        # Nobody else has anything but zeros where a rank has a row, so that the sum is that row, bit for bit.
        return sum_over_ranks(rows, axis)

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
