"""Brings tensors that lie on several ranks together on rank zero."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.dist.collectives import gather_objects, wire_device
from mocte_ds.dist.mesh import Axis


def tensors_on_rank_zero(mine: Mapping[str, Tensor], axis: Axis) -> dict[str, Tensor] | None:
    """The tensors of all ranks by name, in CPU memory of rank zero (collective).

    Args:
        mine: this rank's; of a name that several ranks have, the first rank's tensor is taken. Tensors that are one
            on rank zero stay one.
        axis: the ranks.

    Returns:
        On rank zero all of them, in the order of the ranks; None on the others.
    """
    rank = axis.rank
    listed = gather_objects([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()], axis)
    found: dict[str, Tensor] = {}
    own: dict[tuple, Tensor] = {}
    done: set[str] = set()
    for source, entries in enumerate(listed):
        for name, shape, dtype in entries:
            if name in done:
                continue
            done.add(name)
            if source == 0 == rank:
                found[name] = _copy(mine[name], own)
            elif rank == source:
                _send(mine[name], axis)
            elif rank == 0:
                found[name] = _receive(shape, dtype, source, axis)
    return found if rank == 0 else None


def _copy(tensor: Tensor, own: dict[tuple, Tensor]) -> Tensor:
    key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if not tensor.numel() or key not in own:
        own[key] = tensor.detach().to("cpu", copy=True)
    return own[key]


def _send(tensor: Tensor, axis: Axis) -> None:
    if tensor.numel():
        data = tensor.detach().to(wire_device(tensor.device, axis)).contiguous().reshape(-1)
        dist.send(data.view(torch.uint8), group=axis.group, group_dst=0)


def _receive(shape: tuple[int, ...], dtype: torch.dtype, source: int, axis: Axis) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=wire_device(torch.device("cpu"), axis)).reshape(-1)
    if tensor.numel():
        dist.recv(tensor.view(torch.uint8), group=axis.group, group_src=source)
    return tensor.reshape(shape).cpu()
