"""Ranks that share the matrices of attention must compute with the same batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mocte_ds.dist.collectives import gather_equal
from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import DataError

_BITS = (1 << 62) - 1


def require_same_batch(args: tuple, kwargs: Mapping[str, Any], mesh: Mesh, trains: bool) -> None:
    """Stop a run whose tensor ranks read different batches; DeepSpeed looks at the first one only (collective).

    One exchange: of all ranks in a pass that trains, so that none is left waiting for those that stop; else of the
    ranks of a tensor group, because others may evaluate another number of batches.

    Args:
        args: of the model's call.
        kwargs: of the model's call.
        mesh: of the run; neighbouring ranks of ``world`` are a tensor group.
        trains: whether the pass is one that trains: all ranks have it.

    Raises:
        DataError: on all these ranks; names those whose batches differ.
    """
    ranks = mesh.tensor.size
    if ranks == 1:
        return
    own = torch.tensor(_facts([*args, *(kwargs[name] for name in sorted(kwargs))]))
    found = [part.tolist() for part in gather_equal(own, mesh.world if trains else mesh.tensor)]
    first = 0 if trains else mesh.world.rank - mesh.tensor.rank
    groups = {first + n: found[n : n + ranks] for n in range(0, len(found), ranks)}
    apart = [
        ", ".join(str(rank) for rank in range(start, start + ranks))
        for start, group in groups.items()
        if any(one != group[0] for one in group)
    ]
    if apart:
        raise DataError(
            f"the ranks {' and the ranks '.join(apart)} were given different batches. Matrices are cut over {ranks} "
            "ranks, which work on one batch together: share the data out by engine.mesh.data.rank of "
            "engine.mesh.data.size, or let initialize make the loader (training_data=)."
        )


def _facts(values: list[Any]) -> tuple[int, int]:
    """How many tensors there are, and a checksum of all of them in their order."""
    count = total = 0
    for tensor in _tensors(values):
        count, total = count + 1, (total * 1000003 + _checksum(tensor)) & _BITS
    return count, total


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a batch, which may lie in mappings and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _checksum(t: Tensor) -> int:
    """Of shape, values and their order."""
    flat = t.detach().reshape(-1)
    flat = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    place = torch.arange(flat.numel(), device=flat.device) * 2654435761 + 97
    return (int((flat * place).sum()) + sum((n + 1) * size for n, size in enumerate(t.shape))) & _BITS
