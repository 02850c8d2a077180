"""Counts what a process gives to the collectives: bytes by purpose, and what a ring sends of them."""

import functools
import inspect
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

RING = (
    "sent by a rank in a ring of n: all-reduce 2 (n-1)/n x payload, an all-to-all of given sizes what is for other "
    "ranks, everything else (n-1)/n x payload; payload: the reduced, the gathered or the exchanged bytes"
)

# Where a collective's payload is: the number of its argument. Of a gather it is the whole output.
_PAYLOAD = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "all_gather_single": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "all_to_all": 1,
    "all_to_all_single": 1,
}
_OBJECTS = {"all_gather_object": 1, "broadcast_object_list": 0}
_REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single")


@dataclass
class Traffic:
    """What went through the collectives of one kind."""

    calls: int = 0
    payload_bytes: int = 0
    ring_bytes: float = 0.0
    """See RING."""

    def add(self, payload: int, factor: float) -> None:
        """Count one call; ``factor`` is what a ring sends of a byte."""
        self.calls += 1
        self.payload_bytes += payload
        self.ring_bytes += factor * payload


class WireCounter:
    """Counts while it is entered. DeepSpeed keeps some of the functions: enter before it starts.

    Kinds: `NAME gradients` (reductions), `NAME weights` (gathers), `NAME rows` (all-to-all of floating-point numbers),
    NAME being that of the process group (see :meth:`name_group`; `all` for others); `control` is what ranks agree on:
    pickled objects, single numbers and whole numbers.
    """

    def __init__(self) -> None:
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)
        self._names: dict[int, str] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    def name_group(self, group: Any, name: str) -> None:
        """Count what goes through ``group`` under a name of its own."""
        self._names[id(group)] = name

    def take(self) -> dict[str, Traffic]:
        """What was counted since the last call, by kind."""
        taken, self.traffic = dict(self.traffic), defaultdict(Traffic)
        return taken

    def __enter__(self) -> "WireCounter":
        for name in (*_PAYLOAD, *_OBJECTS):
            original = getattr(dist, name, None)
            if original is not None:
                self._originals[name] = original
                setattr(dist, name, self._counting(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals = {}

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = list(bound.arguments.values())
            group = bound.arguments["group"]
            if name in _OBJECTS:
                self.traffic["control"].add(len(pickle.dumps(values[_OBJECTS[name]])), _factor(name, group))
            else:
                parts = bound.arguments.get("input_split_sizes")
                self._count(name, values[_PAYLOAD[name]], group, parts)
            return original(*args, **kwargs)

        return collective

    def _count(self, name: str, payload: Tensor | list[Tensor], group: Any, parts: list[int] | None) -> None:
        tensors = [payload] if isinstance(payload, Tensor) else payload
        numbers = sum(tensor.numel() for tensor in tensors)
        kind = "control"
        if numbers > 1 and tensors[0].is_floating_point():
            what = "gradients" if name in _REDUCTIONS else "rows" if name.startswith("all_to_all") else "weights"
            kind = f"{self._names.get(id(group), 'all')} {what}"
        factor = _factor(name, group)
        if parts is not None:
            factor = 1.0 - parts[dist.get_rank(group)] / sum(parts) if sum(parts) else 0.0
        self.traffic[kind].add(sum(tensor.nbytes for tensor in tensors), factor)


def _factor(name: str, group: Any) -> float:
    """Bytes that a rank sends for each byte of payload; see RING."""
    size = dist.get_world_size(group)
    return (2.0 if name == "all_reduce" else 1.0) * (size - 1) / size
