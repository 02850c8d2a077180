"""How ranks divide an evaluation: replicas of the model share the items, the ranks of one replica its experts."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocte_ds.dist.collectives import require_same, sum_over_ranks
from mocte_ds.dist.mesh import ALONE, Axis, mesh_of_processes
from mocte_ds.errors import ConfigError


@dataclass(frozen=True)
class Replicas:
    """Of one model, on all ranks."""

    number: int
    """Of this rank's replica."""
    count: int
    place: int
    """Of this rank in its replica."""
    size: int
    """Ranks of a replica."""
    axis: Axis = ALONE
    """Ranks of this rank's replica."""
    world: Axis = ALONE
    """All ranks."""

    @classmethod
    def of(cls, ep_size: int | None) -> "Replicas":
        """Divide all ranks (collective).

        Args:
            ep_size: ranks of a replica, that follow each other; None: all ranks.

        Raises:
            ConfigError: it does not divide their number.
        """
        world = mesh_of_processes().world
        rank, ranks = world.rank, world.size
        size = ranks if ep_size is None else ep_size
        if size < 1 or ranks % size:
            raise ConfigError(f"ep_size = {ep_size} must divide the number of ranks, {ranks}.")
        axis = ALONE if size == 1 else world
        if 1 < size < ranks:
            # Every rank takes part in making every group.
            groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
            axis = Axis.of(groups[rank // size])
        return cls(rank // size, ranks // size, rank % size, size, axis, world)

    def require_same(self, found: Any, what: str) -> None:
        """Stop unless all ranks of the replica have found the same.

        Args:
            found: plain values.
            what: they are, for the message.

        Raises:
            Disagreement: they have not.
        """
        if self.size > 1:
            require_same(hashlib.sha256(repr(found).encode()).hexdigest(), what, self.axis)

    def summed(self, values: Tensor) -> Tensor:
        """Sum over the ranks of the replica."""
        return sum_over_ranks(values, self.axis)

    def of_each(self, values: Any) -> Any:
        """What the first rank of each replica has, from what all ranks have."""
        return values[:: self.size]

    def share(self, number: int) -> range:
        """Which of so many things this rank of the replica holds: a part of them, as even as can be."""
        return range(number * self.place // self.size, number * (self.place + 1) // self.size)


def join_ranks() -> None:
    """Form the group of the ranks that a launcher has started, unless it is there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if gpu else "gloo")
