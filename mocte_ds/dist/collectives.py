"""Every collective of a check, named for what the ranks agree on; each does nothing where there is one process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.errors import Disagreement


def world(group: Any = None) -> tuple[int, int]:
    """This rank and the number of ranks in the group; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Sum of a tensor over the ranks; same shape and dtype on all of them. bf16 is summed in fp32."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def max_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Largest value of each element over the ranks."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def gather_rows(rows: Tensor, group: Any = None) -> Tensor:
    """Rows of all ranks, in the order of the ranks.

    Args:
        rows: (n, ...) with any n, also 0, and the same other dimensions and dtype on all ranks.
        group: process group.

    Returns:
        (sum of n, ...) on every rank.
    """
    _, size = world(group)
    if size == 1:
        return rows
    device = _wire_device(rows.device)
    count = torch.tensor([rows.shape[0]], dtype=torch.int64, device=device)
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    most = max(int(c) for c in counts)
    # Collectives want equal shapes, and gloo has no bf16: pad, and send fp32.
    wire = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    padded = torch.zeros((most, *rows.shape[1:]), dtype=wire.dtype, device=device)
    padded[: rows.shape[0]] = wire
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)]).to(rows.device, rows.dtype)


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The picklable values of all ranks, in the order of the ranks, on every rank."""
    _, size = world(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_zero(value: Any, group: Any = None) -> Any:
    """Rank 0's value on every rank; a tensor keeps shape, dtype and device."""
    rank, size = world(group)
    if size == 1:
        return value
    box = [value.cpu() if isinstance(value, Tensor) else value] if rank == 0 else [None]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0].to(value.device) if isinstance(value, Tensor) else box[0]


def require_same(value: Any, what: str, group: Any = None) -> None:
    """Make sure that all ranks hold the same value before any of them acts on it.

    Args:
        value: picklable and comparable by ==.
        what: names the value in the message.
        group: process group.

    Raises:
        Disagreement: on every rank, with the first two values that differ.
    """
    values = gather_objects(value, group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise Disagreement(f"ranks disagree on the {what}: rank 0 has {values[0]!r}, rank {rank} has {other!r}.")


def _all_reduce(tensor: Tensor, operation: Any, group: Any) -> Tensor:
    _, size = world(group)
    if size == 1:
        return tensor
    wire = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    wire = wire.detach().to(_wire_device(tensor.device), copy=True).contiguous()
    dist.all_reduce(wire, operation, group=group)
    return wire.to(tensor.device, tensor.dtype)


def _wire_device(device: torch.device) -> torch.device:
    """NCCL moves GPU tensors only."""
    if "nccl" in str(dist.get_backend()) and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
