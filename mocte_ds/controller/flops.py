"""Counts the FLOPs of a check while it runs, since samples may double and iterations may end early."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mocte_ds.dist.collectives import sum_over_ranks
from mocte_ds.dist.mesh import Axis


class FlopCount(TorchDispatchMode):
    """Context manager: matrix products of this thread are counted by torch's own formulas, for this rank.

    torch's FlopCounterMode counts the same, but also hooks every module for a table by module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def of_all_ranks(parts: Mapping[str, int], axis: Axis) -> dict[str, int]:
    """FLOPs by part, all ranks together (collective)."""
    summed = sum_over_ranks(torch.tensor(list(parts.values()), dtype=torch.int64), axis)
    return dict(zip(parts, summed.tolist(), strict=True))
