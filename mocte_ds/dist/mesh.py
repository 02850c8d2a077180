"""Which ranks share what: the groups that a run communicates in, made once and passed to whoever communicates."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mocte_ds.errors import MocteError


@dataclass(frozen=True)
class Axis:
    """Ranks that communicate with each other, and the place of this one among them."""

    group: Any
    """Process group of torch.distributed; None where this process is alone."""
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> "Axis":
        """The ranks of a process group.

        Raises:
            MocteError: no group, or one that this process does not belong to; torch would take all ranks, or none.
        """
        rank = -1 if group is None else dist.get_rank(group)
        if rank < 0:
            raise MocteError("an axis of ranks needs a process group that this process belongs to.")
        return cls(group, rank, dist.get_world_size(group))


ALONE = Axis(None, 0, 1)
"""This process and no other."""


@dataclass(frozen=True)
class Mesh:
    """The axes along which the ranks of a run are laid out."""

    world: Axis
    """All ranks: what they must agree on before any of them acts, and the files that they write together."""
    data: Axis
    """Ranks that read different data, and over which sums of tokens, features and losses go."""
    expert: Axis
    """Ranks over which the experts of a bank are spread; ranks of the tensor axis may be among them."""
    expert_data: Axis
    """Ranks that hold the same experts."""
    tensor: Axis
    """Ranks that read the same data, and that each hold a part of the matrices of attention."""


def mesh_of_processes() -> Mesh:
    """The mesh of processes that have no engine: each reads other data and holds all of the model."""
    world = Axis.of(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else ALONE
    return Mesh(world=world, data=world, expert=ALONE, expert_data=world, tensor=ALONE)
