"""Ranks that share the matrices of attention must compute with the same batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mocte_ds.dist.collectives import max_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import DataError


def require_same_batch(args: tuple, kwargs: Mapping[str, Any], axis: Axis) -> None:
    """Stop the ranks whose batches differ; DeepSpeed looks at the first one only (collective).

    Args:
        args: of the model's call.
        kwargs: of the model's call.
        axis: of a tensor group.

    Raises:
        DataError: on all ranks of the axis.
    """
    if axis.size == 1:
        return
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    sums = [_checksum(value) for value in values if isinstance(value, Tensor)]
    own = torch.stack(sums) if sums else torch.zeros(1, dtype=torch.int64)
    shape = torch.tensor([len(sums), -len(sums)])
    if not int(max_over_ranks(shape, axis).sum()):  # the same number of tensors, so that their sums can be compared
        most, least = max_over_ranks(torch.stack([own, -own]), axis)
        if bool((most == -least).all()):
            return
    raise DataError(
        f"the {axis.size} ranks of a tensor group were given different batches. Matrices are cut over them, so that "
        "they work on one batch together: share the data out by engine.mesh.data.rank of engine.mesh.data.size, or let "
        "initialize make the loader (training_data=)."
    )


def _checksum(t: Tensor) -> Tensor:
    """Of shape, values and their order; () int64 on the CPU."""
    flat = t.detach().reshape(-1)
    flat = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    place = torch.arange(flat.numel(), device=flat.device) * 2654435761 + 97
    total = (flat * place).sum() + sum((n + 1) * size for n, size in enumerate(t.shape))
    return (total.cpu() & ((1 << 62) - 1)).to(torch.int64)
