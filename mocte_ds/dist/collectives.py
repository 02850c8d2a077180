"""What the ranks of a run sum, gather, hear from rank zero, and must agree on before they act."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import Disagreement

_LONGEST_VALUE = 300  # characters of a value in an error message


def sum_over_ranks(t: Tensor, axis: Axis) -> Tensor:
    """Sum of ``t`` over the ranks.

    Args:
        t: the same shape and dtype on every rank, on any device; not changed. bf16 and fp16 are summed in fp32.
        axis: the ranks.

    Returns:
        The sum, of ``t``'s dtype and device; ``t`` itself where there is one rank only.
    """
    return _reduce(t, dist.ReduceOp.SUM, axis)


def max_over_ranks(t: Tensor, axis: Axis) -> Tensor:
    """Largest value of each element of ``t`` over the ranks; like :func:`sum_over_ranks` otherwise."""
    return _reduce(t, dist.ReduceOp.MAX, axis)


def gather_rows(t: Tensor, axis: Axis) -> Tensor:
    """The rows of all ranks below each other, in the order of the ranks, bit for bit.

    Args:
        t: (n, ...); n may differ between ranks and may be 0, the rest of the shape and the dtype may not.
        axis: the ranks.

    Returns:
        (sum of n, ...) on ``t``'s device, the same on every rank.
    """
    if axis.size == 1:
        return t
    sizes = [int(count) for count in gather_equal(torch.tensor([t.shape[0]], dtype=torch.int64), axis)]
    # Bytes travel: no backend lacks them, and 64-bit keys arrive unrounded.
    width = t[0].numel() if t.shape[0] else torch.empty((1, *t.shape[1:])).numel()
    padded = torch.zeros(max(sizes), width, dtype=t.dtype, device=t.device)
    padded[: t.shape[0]] = t.detach().reshape(t.shape[0], width)
    if not padded.numel():
        return t.new_empty((sum(sizes), *t.shape[1:]))
    parts = gather_equal(padded.view(torch.uint8), axis)
    rows = [part.view(t.dtype)[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(rows).reshape(-1, *t.shape[1:])


def gather_equal(t: Tensor, axis: Axis) -> list[Tensor]:
    """``t`` of every rank in one exchange, in the order of the ranks.

    Args:
        t: the same shape and dtype on every rank, on any device.
        axis: the ranks.

    Returns:
        The tensors, on ``t``'s device, the same on every rank.
    """
    if axis.size == 1:
        return [t]
    own = t.detach().to(wire_device(t.device, axis)).contiguous()
    parts = [torch.empty_like(own) for _ in range(axis.size)]
    dist.all_gather(parts, own, group=axis.group)
    return [part.to(t.device) for part in parts]


def stack_over_ranks(t: Tensor, axis: Axis) -> Tensor:
    """``t`` of every rank, bit for bit, in one exchange.

    Args:
        t: (...) of a shape and dtype that all ranks are known to share.
        axis: the ranks.

    Returns:
        (ranks, ...) on ``t``'s device, in the order of the ranks, the same on every rank.
    """
    own = t.detach().contiguous().reshape(-1)
    parts = gather_equal(own.view(torch.uint8), axis)  # bytes, as in gather_rows
    return torch.stack([part.view(t.dtype).reshape(t.shape) for part in parts])


def gather_objects(obj: Any, axis: Axis) -> list[Any]:
    """``obj`` of every rank, in the order of the ranks (pickled: for small values)."""
    if axis.size == 1:
        return [obj]
    gathered: list[Any] = [None] * axis.size
    dist.all_gather_object(gathered, obj, group=axis.group)
    return gathered


def from_rank_zero(obj: Any, axis: Axis) -> Any:
    """What the first of the ranks passed.

    Args:
        obj: any picklable value, or a tensor; what other ranks pass is only looked at for its device.
        axis: the ranks.

    Returns:
        That rank's value; a tensor comes on the device of this rank's own tensor, else on the CPU.
    """
    if axis.size == 1:
        return obj
    source = dist.get_global_rank(axis.group, 0)
    is_tensor = isinstance(obj, Tensor)
    told: tuple = ("tensor", tuple(obj.shape), obj.dtype) if is_tensor else ("object", obj)
    box = [told if axis.rank == 0 else ()]
    dist.broadcast_object_list(box, src=source, group=axis.group)
    kind, *rest = box[0]
    if kind == "object":
        return rest[0]
    shape, dtype = rest
    home = obj.device if is_tensor else torch.device("cpu")
    wire = wire_device(home, axis)
    if axis.rank == 0:
        value = obj.detach().to(wire).clone().reshape(-1)
    else:
        value = torch.empty(shape, dtype=dtype, device=wire).reshape(-1)
    if value.numel():
        dist.broadcast(value.view(torch.uint8), src=source, group=axis.group)
    return value.reshape(shape).to(home)


def first_problem(text: str | None, axis: Axis) -> str | None:
    """What is wrong on the first rank that has found something, said on all of them.

    A rank that stops alone leaves the others waiting in their next collective operation.

    Args:
        text: what is wrong on this rank; None: nothing.
        axis: the ranks.

    Returns:
        Its text, with the rank where that is another one; None: nothing is wrong anywhere.
    """
    if not int(max_over_ranks(torch.tensor(int(text is not None)), axis)):  # a number is cheaper than objects
        return None
    found = gather_objects(text, axis)
    first = next(number for number, one in enumerate(found) if one is not None)
    return found[first] if first == axis.rank else f"rank {first}: {found[first]}"


def require_same(obj: Any, what: str, axis: Axis) -> None:
    """Stop every rank unless all ranks hold the same value.

    Args:
        obj: plain values, tensors (compared bit for bit), and lists, tuples and mappings of them.
        what: what the value is, for the message.
        axis: the ranks.

    Raises:
        Disagreement: on every rank; names the value of rank zero and that of the first rank that differs.
    """
    texts = gather_objects(_fingerprint(obj), axis)
    for rank, text in enumerate(texts):
        if text != texts[0]:
            first, other = _around_difference(texts[0], text)
            raise Disagreement(
                f"the ranks disagree on {what}: rank 0 has {first}, rank {rank} has {other}. All ranks stop before any "
                "of them acts on it; start all ranks with the same configuration, data and code."
            )


def wait_for_all(axis: Axis) -> None:
    """Wait until all ranks have come here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def _reduce(t: Tensor, operation: Any, axis: Axis) -> Tensor:
    if axis.size == 1:
        return t
    exact = t.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if exact else torch.int64 if t.dtype == torch.bool else t.dtype
    value = t.detach().to(wire_device(t.device, axis), wide, copy=True).contiguous()
    dist.all_reduce(value, op=operation, group=axis.group)
    return value.to(t.device, t.dtype)


def wire_device(device: torch.device, axis: Axis) -> torch.device:
    """Where a tensor must be to travel: NCCL takes CUDA tensors only, gloo is safe with CPU tensors only."""
    backend = str(dist.get_backend(axis.group))
    if backend == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else device


def _fingerprint(obj: Any) -> str:
    """Text that is equal exactly where two values are; tensors by shape, dtype and a hash of their bytes."""
    if isinstance(obj, Tensor):
        data = obj.detach().cpu().contiguous().reshape(-1)
        digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        values = f" {data.tolist()}" if data.numel() <= 8 else ""
        return f"tensor(shape {tuple(obj.shape)}, {obj.dtype}, sha256 {digest}{values})"
    if isinstance(obj, Mapping):
        return "{" + ", ".join(f"{_fingerprint(k)}: {_fingerprint(v)}" for k, v in obj.items()) + "}"
    if isinstance(obj, list | tuple):
        return ("[" if isinstance(obj, list) else "(") + ", ".join(_fingerprint(item) for item in obj) + "]"
    if isinstance(obj, set | frozenset):
        return "set" + _fingerprint(sorted(obj, key=repr))
    return repr(obj)


def _around_difference(first: str, second: str) -> tuple[str, str]:
    """Both texts, cut to the part where they differ."""
    if max(len(first), len(second)) <= _LONGEST_VALUE:
        return first, second
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    start = max(0, place - 40)
    cut = slice(start, start + _LONGEST_VALUE)
    return f"...{first[cut]}...", f"...{second[cut]}..."
