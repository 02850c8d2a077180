"""A sample of token features that is the same however many ranks share the batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.dist.collectives import gather_rows
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError

# Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014): the mixing function of SplitMix64.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))
_POSITIVE = (1 << 63) - 1


def hash_keys(sequence_index: Tensor, position: Tensor, seed: int) -> Tensor:
    """A 63-bit number for every token of a run, the same on every rank and machine.

    Args:
        sequence_index: int64, number of the sequence in the run's global order.
        position: int64 of the same shape (or one that broadcasts), place in the sequence.
        seed: another seed gives unrelated numbers.

    Returns:
        int64, not negative.
    """
    return mix(mix(_scrambled(seed), sequence_index), position) & _POSITIVE


def mix(state: Tensor | int, value: Tensor | int) -> Tensor:
    """One SplitMix64 step: spreads ``state`` and ``value`` over all 64 bits (int64, wrapping)."""
    where = value if isinstance(value, Tensor) else state
    device = where.device if isinstance(where, Tensor) else None
    state, value = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (state, value))
    z = (state ^ value) + _signed(_GOLDEN)
    for shift, factor in _MIX:
        # int64's shift copies the sign; the mask makes it the logical shift of unsigned numbers.
        z = z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            z = z * _signed(factor)
    return z


@dataclass(frozen=True)
class Update:
    """What one batch changes in a sample."""

    take: Tensor
    """(t,) rows of the batch that enter."""
    slots: Tensor
    """(t,) slots where they are kept: free ones, or those of rows that leave."""


@dataclass(frozen=True)
class Choice:
    """Which of this rank's rows belong to the sample of all ranks, and the order of that sample."""

    mask: Tensor
    """(c,) bool, of the rows kept on this rank."""
    place: Tensor
    """(k,) int64 place of each chosen row of this rank in the order of all chosen rows."""
    order: Tensor
    """(K,) int64 order of the gathered chosen rows of all ranks by their hashes; the same on all ranks."""


class Selection:
    """Which rows stay: those whose keys have the smallest seeded hash. Several reservoirs can share one.

    The choice depends on the keys only, so several ranks with parts of the rows keep, together, what one rank with all
    rows would keep. Shapes: m new rows, c rows kept.
    """

    def __init__(self, capacity: int, seed: int, ranks: int = 1) -> None:
        """Nothing is kept yet.

        Args:
            capacity: rows kept over all ranks together.
            seed: seed of the choice.
            ranks: ranks that see about the same number of rows. Each keeps at most four times its even share, plus 64
                rows. Uniform hashes practically never exceed that; if they did, the sample would be smaller, and
                still a right one.
        """
        if capacity < 1:
            raise MocteError(f"a reservoir of {capacity} rows keeps nothing; give it a capacity of 1 or more.")
        self.capacity, self.seed = capacity, seed
        self.room = min(capacity, 4 * -(-capacity // ranks) + 64)
        """Rows kept on this rank."""
        self.clear()
        self.mark()

    def clear(self) -> None:
        """Forget all keys; what is marked stays marked."""
        self.keys = torch.empty(0, dtype=torch.int64)
        """(c,) keys of the kept rows, smallest hash first."""
        self.slots = torch.empty(0, dtype=torch.int64)
        """(c,) where the rows of these keys lie, among :attr:`room` slots."""
        self._order = torch.empty(0, dtype=torch.int64)  # hashes, ascending

    @property
    def hashes(self) -> Tensor:
        """(c,) seeded hashes of what is kept, ascending."""
        return self._order

    @torch.no_grad()
    def offer(self, keys: Tensor) -> Update | None:
        """Choose from a batch.

        Args:
            keys: (m,) int64, one key a row, unique in the run (see :func:`hash_keys`).

        Returns:
            What enters and what stays; None where nothing enters.
        """
        keys = keys.to(torch.int64)
        if keys.device != self.keys.device:
            self.keys, self.slots, self._order = (t.to(keys.device) for t in (self.keys, self.slots, self._order))
        order = mix(_scrambled(self.seed), keys) & _POSITIVE
        if self._order.numel() == self.room:
            # Most rows of a long run fall out here, before any of them is copied.
            take = (order < self._order[-1]).nonzero()[:, 0]
        else:
            take = torch.arange(len(keys), device=keys.device)
        if not len(take):
            return None
        held = len(self._order)
        ascending, place = torch.cat([self._order, order[take]]).sort(stable=True)
        stays, leaves = place[: self.room], place[self.room :]
        # Rows that leave make room for those that enter; the first ones go where nothing was yet.
        entering = stays[stays >= held] - held
        free = torch.arange(held, min(self.room, held + len(entering)), device=keys.device)
        slots = torch.cat([free, self.slots[leaves[leaves < held]]])[: len(entering)]
        where = torch.cat([self.slots, torch.zeros_like(take)])
        where[held + entering] = slots
        self._order, self.slots = ascending[: self.room], where[stays]
        self.keys = torch.cat([self.keys, keys[take]])[stays]
        return Update(take[entering], slots)

    def mark(self) -> None:
        """Remember what is kept, for :meth:`take_back`; offers change no tensor in place."""
        self._marked = (self.keys, self.slots, self._order)

    def take_back(self) -> None:
        """Forget what was offered since :meth:`mark`."""
        self.keys, self.slots, self._order = self._marked

    def choose(self, axis: Axis, count: int | None = None) -> Choice:
        """Which rows of all ranks have the smallest hashes (always collective: no rank answers from memory).

        Sharers of the selection can use one answer as long as nothing has been offered since.

        Args:
            axis: the ranks.
            count: rows over all ranks; None: the capacity.
        """
        count = self.capacity if count is None else min(count, self.capacity)
        everywhere = gather_rows(self._order, axis)
        bound = everywhere.kthvalue(count).values if everywhere.numel() > count else everywhere.new_tensor(_POSITIVE)
        if self.room < self.capacity:
            # A full rank may have dropped rows past its last one that belong to the sample: all ranks stop there.
            full = self._order.numel() == self.room
            ends = gather_rows(self._order[-1:] if full else self._order[:0], axis)
            bound = torch.minimum(bound, ends.min()) if ends.numel() else bound
        mask, chosen = self._order <= bound, everywhere[everywhere <= bound]
        ascending, order = chosen.sort(stable=True)
        return Choice(mask, torch.searchsorted(ascending, self._order[mask]), order)

    def chosen(self, axis: Axis, count: int | None = None) -> Tensor:
        """(c,) the mask of :meth:`choose` (collective)."""
        return self.choose(axis, count).mask

    def state_dict(self) -> dict[str, Tensor]:
        """Keys and hashes of this rank."""
        return {"keys": self.keys, "slots": self.slots, "order": self._order}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.keys, self.slots, self._order = state["keys"], state["slots"], state["order"]


class Reservoir:
    """The rows of a :class:`Selection`. Shapes: m new rows, c rows kept, w numbers a row."""

    def __init__(
        self,
        capacity: int,
        width: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        ranks: int = 1,
        selection: Selection | None = None,
    ) -> None:
        """Make an empty reservoir.

        Args:
            capacity: rows kept over all ranks together.
            width: w.
            seed: seed of the choice.
            dtype: in which rows are stored; bf16 halves the memory.
            ranks: see :class:`Selection`.
            selection: shared with others, who get the same batches; None: one of its own.
        """
        self.selection = Selection(capacity, seed, ranks) if selection is None else selection
        self.width, self.dtype = width, dtype
        self._kept = torch.empty(0, width, dtype=dtype)
        self._marked: Tensor | None = None
        self._replaced: list[tuple[Tensor, Tensor, Tensor]] = []
        """Since :meth:`mark`: of what, which rows, and what they were."""

    def clear(self) -> None:
        """Forget all rows, and with them what is selected; what is marked stays marked."""
        self.selection.clear()
        self._kept = torch.empty(0, self.width, dtype=self.dtype)

    @torch.no_grad()
    def add(self, rows: Tensor, keys: Tensor) -> None:
        """Offer rows; those with small hashes stay, the largest ones leave.

        Args:
            rows: (m, w) features on any device; the reservoir moves to it. Copied, never kept by reference.
            keys: (m,) int64, one key a row, unique in the run (see :func:`hash_keys`).

        Raises:
            MocteError: the shapes do not fit.
        """
        if rows.dim() != 2 or rows.shape[1] != self.width or keys.shape != rows.shape[:1]:
            raise MocteError(
                f"the reservoir takes rows of {self.width} numbers with one key each, not rows {tuple(rows.shape)} "
                f"with keys {tuple(keys.shape)}."
            )
        self.apply(rows, self.selection.offer(keys.to(rows.device)))

    @torch.no_grad()
    def apply(self, rows: Tensor, update: Update | None) -> None:
        """Take the rows (m, w) of a batch that the selection has chosen."""
        if update is None:
            return
        held = len(self.selection.slots)
        if len(self._kept) < held or self._kept.device != rows.device:
            # Memory grows with the rows that are there, not with the capacity that a config asks for.
            room = min(self.selection.room, max(held, 2 * len(self._kept)))
            kept = torch.empty(room, self.width, dtype=self.dtype, device=rows.device)
            kept[: len(self._kept)] = self._kept
            self._kept = kept
        # Only rows that enter are touched: a window has many batches, and few rows of the later ones enter.
        if self._marked is not None:
            self._replaced.append((self._kept, update.slots, self._kept[update.slots]))
        self._kept[update.slots] = rows.detach()[update.take].to(self.dtype)

    def mark(self) -> None:
        """Remember the rows, for :meth:`take_back`; the selection has its own mark."""
        self._marked, self._replaced = self._kept, []

    def take_back(self) -> None:
        """Put back what entered since :meth:`mark`."""
        for kept, slots, rows in reversed(self._replaced):
            kept[slots] = rows
        self._kept, self._replaced = self._kept if self._marked is None else self._marked, []

    def rows(self) -> Tensor:
        """(c, w) rows kept on this rank, smallest hash first."""
        return self._found(self.selection.slots)

    def keys(self) -> Tensor:
        """(c,) int64 keys of :meth:`rows`."""
        return self.selection.keys

    def merged_rows(self, axis: Axis, count: int | None = None) -> Tensor:
        """This rank's part (c, w) of the rows that all ranks keep together (collective).

        Args:
            axis: the ranks.
            count: rows over all ranks, those with the smallest hashes; None: the capacity.
        """
        return self.chosen_rows(self.selection.choose(axis, count))

    def chosen_rows(self, choice: Choice) -> Tensor:
        """(c, w) this rank's rows of a choice that the selection has just made."""
        return self._found(self.selection.slots[choice.mask])

    def merged_keys(self, axis: Axis) -> Tensor:
        """(c,) int64 keys of :meth:`merged_rows` (collective)."""
        return self.selection.keys[self.selection.chosen(axis)]

    def gathered_rows(self, axis: Axis) -> Tensor:
        """(c, w) the rows that all ranks keep together, on every rank, in an order that depends on keys only."""
        choice = self.selection.choose(axis)
        return gather_rows(self.chosen_rows(choice), axis)[choice.order]

    def _found(self, slots: Tensor) -> Tensor:
        # While no row has entered, nothing tells the reservoir on which device the rows are.
        return self._kept.to(slots.device)[slots] if not len(self._kept) else self._kept[slots]

    def state_dict(self) -> dict[str, Tensor]:
        """Rows of this rank; the selection's state is beside it."""
        return {"rows": self._kept[: int(self.selection.slots.max()) + 1 if len(self.selection.slots) else 0]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._kept = state["rows"]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _scrambled(seed: int) -> int:
    """The seed spread over 64 bits, or seed 1 with sequence 0 would be seed 0 with sequence 1."""
    return int(mix(_signed(seed % (1 << 64)), 0))
