"""Gradients of parameters that every rank of a tensor group has whole: compared, counted once, and made the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.dist.collectives import gather_objects
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError

_AGREEMENT = 1e-3
"""Relative difference of a unit's squared norms that the rounding of a GPU's sums may make."""
_PIECE = 1 << 22
"""Numbers that travel together: 16 MB in fp32, beside gradients of gigabytes."""


def agreed_total(
    squares: Tensor,
    whole: Sequence[str | None],
    rounding: float,
    data: Any,
    tensor: Any,
    tensor_rank: int,
    spoiled: Tensor | float = 0.0,
) -> Tensor:
    """Sum of squares over all ranks where matrices are cut; parameters that every tensor rank has count once.

    Two squared norms of one gradient may be apart by 1e-3 of the larger, and by what is lost when the sums of the
    largest gradients are rounded: terms that cancel leave a gradient near zero that is nothing else.

    Args:
        squares: (groups,) of the gradients in this rank's partition. One that is not finite makes the total so on all
            ranks.
        whole: for each group the name of its unit, if every tensor rank has all of it; else None.
        rounding: relative, of a number in the type that the model computes in.
        data: process group of the ranks that read other data.
        tensor: process group of the ranks that matrices are cut over.
        tensor_rank: of this rank in it.
        spoiled: added to this rank's sum; NaN makes the total NaN on all ranks, so that the step is dropped.

    Returns:
        () the sum.

    Raises:
        MocteError: on all ranks; the gradient of a whole parameter differs between tensor ranks, whose weights would
            drift apart.
    """
    numbers = [n for n, name in enumerate(whole) if name is not None]
    own = squares[numbers].double()
    most = least = own
    if numbers:
        bounds = torch.cat([own, -own])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=tensor)
        most, least = bounds[: len(own)], -bounds[len(own) :]
    # A step with what is not finite is dropped, whichever rank has it.
    finite = most.isfinite() & least.isfinite()
    excess = torch.where(finite, most - least - _AGREEMENT * most, 0.0).clamp(min=0.0)
    counted = squares.double()
    if tensor_rank:
        counted[numbers] = torch.where(own.isfinite(), 0.0, own)
    sums = torch.stack([counted.sum() + spoiled, torch.zeros_like(excess.sum()) if tensor_rank else excess.sum()])
    for group in (data, tensor):
        dist.all_reduce(sums, group=group)
    total, apart = sums.tolist()
    if apart > rounding**2 * total:
        names = [str(whole[numbers[n]]) for n in excess.nonzero()[:, 0].tolist()]
        _refuse(names, data, tensor)
    return sums[0].to(squares.dtype)


def _refuse(names: list[str], data: Any, tensor: Any) -> None:
    """Say the same on all ranks, which all come here (collective)."""
    found = [(dist.get_process_group_ranks(tensor), names)]
    for group in (tensor, data):
        found = [one for part in gather_objects(found, Axis.of(group)) for one in part]
    ranks, units = min((ranks, units) for ranks, units in found if units)
    raise MocteError(
        f"the gradient of {units[0]} differs between the tensor ranks {', '.join(map(str, ranks))}, which hold the "
        "same weights of it: they would drift apart. Dropout needs the same random state on all ranks of a tensor "
        "group, and their batches must be the same."
    )


def take_first(gradients: Sequence[Tensor], tensor: Any, piece: int = _PIECE) -> None:
    """Give all ranks of a tensor group the gradients of the first one (collective).

    A GPU's sums may round otherwise on each, and weights that differ in one bit drift apart.

    Args:
        gradients: of the same shapes and dtype on all of them; changed in place.
        tensor: process group of the ranks.
        piece: numbers that may be copied at a time; a larger gradient travels from where it lies.
    """
    source = dist.get_global_rank(tensor, 0)
    for parts in _pieces(gradients, piece):
        if len(parts) == 1 and parts[0].is_contiguous():
            dist.broadcast(parts[0], source, group=tensor)
            continue
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.broadcast(flat, source, group=tensor)
        for part, first in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(first.view_as(part))


def _pieces(tensors: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Neighbours that have up to ``most`` numbers together; a larger tensor alone."""
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and sum(one.numel() for one in piece) + tensor.numel() > most:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece
