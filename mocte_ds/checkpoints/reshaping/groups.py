"""A parameter group of the optimizer put together from the ranks' parts, and cut for other ranks."""

from dataclasses import replace
from typing import Any

import torch

from mocte_ds.checkpoints.disk_tensors import DiskTensor, filled, join
from mocte_ds.checkpoints.reshaping.rank_layout import partition_size
from mocte_ds.checkpoints.reshaping.shards import GroupPart, is_vector
from mocte_ds.errors import CheckpointError


def joined(parts: list[GroupPart], files: list[str]) -> GroupPart:
    """The parts of all ranks put together, as if one rank had the whole group, without padding.

    Args:
        parts: of the ranks that share the group, in their order.
        files: where each part comes from, for messages.

    Raises:
        CheckpointError: a part is not that of its rank; names its file.
    """
    total = sum(part.master.numel for part in parts)
    size, fragments, place = partition_size(total, len(parts)), dict[str, tuple[int, int]](), 0
    for index, (part, file) in enumerate(zip(parts, files, strict=True)):
        own = max(0, min(size, total - index * size))
        if (part.master.numel, part.padding, part.ranks) != (own, size - own, len(parts)):
            raise CheckpointError(
                f"{file} holds {part.master.numel} + {part.padding} elements of a group that {part.ranks} ranks "
                f"share, where {own} + {size - own} of {len(parts)} belong: it is of another rank or another run."
            )
        if (part.settings, part.alignment) != (parts[0].settings, parts[0].alignment):
            raise CheckpointError(f"{file} has another learning rate, decay or kind of a group than {files[0]}.")
        if not _same(_not_partitioned(part), _not_partitioned(parts[0])):
            raise CheckpointError(f"{file} has other steps of the optimizer than {files[0]}: of two checkpoints.")
        for name, (start, numel) in part.fragments.items():
            start += index * size
            before = fragments.get(name, (start, 0))
            if sum(before) != start or start < place:
                raise CheckpointError(
                    f"{file} holds {name} where another parameter belongs: it is of another rank or another run."
                )
            fragments[name], place = (before[0], before[1] + numel), start + numel
    _require_full(fragments, parts[0].alignment, total, files)
    state = {
        name: join([part.state[name] for part in parts]).flat(0, total) if is_vector(value) else value
        for name, value in parts[0].state.items()
    }
    master = join([part.master for part in parts])
    return replace(parts[0], master=master, padding=0, ranks=1, state=state, fragments=fragments)


def cut(whole: GroupPart, index: int, ranks: int) -> GroupPart:
    """The part of rank ``index`` of ``ranks`` ranks that share a whole group."""
    total = whole.master.numel
    size = partition_size(total, ranks)
    first, last = min(index * size, total), min((index + 1) * size, total)
    fragments = {}
    for name, (start, numel) in whole.fragments.items():
        low, high = max(start, first), min(start + numel, last)
        if low < high:
            fragments[name] = (low - index * size, high - low)
    state = {name: value.flat(first, last, size) if is_vector(value) else value for name, value in whole.state.items()}
    padding = size - (last - first)
    master = whole.master.flat(first, last)
    return replace(whole, master=master, padding=padding, ranks=ranks, state=state, fragments=fragments)


def _require_full(fragments: dict[str, tuple[int, int]], alignment: list[int], total: int, files: list[str]) -> None:
    """The parameters must follow each other without a hole."""
    place = 0
    if len(fragments) == len(alignment):
        for (start, numel), padding in zip(fragments.values(), alignment, strict=True):
            place = start + numel + padding if start == place else -1
    if place != total:
        raise CheckpointError(
            f"the parameters in {', '.join(files)} do not fill their group of {total} elements: one is of another rank "
            "or another run."
        )


def _not_partitioned(part: GroupPart) -> dict[str, Any]:
    """What of the optimizer's state is one value; for moments that they are there."""
    return {name: value.dtype if is_vector(value) else value for name, value in part.state.items()}


def _same(one: Any, other: Any) -> bool:
    """Whether two sets of plain values are equal, tensors included."""
    if isinstance(one, DiskTensor) and isinstance(other, DiskTensor):
        return torch.equal(filled(one), filled(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and one == other
