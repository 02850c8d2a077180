"""The mesh of a run's ranks, of the process groups that DeepSpeed makes."""

from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

from mocte_ds.dist.mesh import ALONE, Axis, Mesh
from mocte_ds.errors import ConfigError, MocteError


def make_mesh(ep_size: int, data_before_expert: bool = False, mpu: Any = None) -> Mesh:
    """The mesh of a run; makes DeepSpeed's groups if they are missing (collective).

    Args:
        ep_size: ranks that share the experts of a bank.
        data_before_expert: DeepSpeed's `use_data_before_expert_parallelism`.
        mpu: the caller's parallel groups, as DeepSpeed takes them; None: all ranks read different data.

    Raises:
        ConfigError: the data-parallel ranks of ``mpu`` are not all ranks.
        MocteError: another engine in this process has made other groups.
    """
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    world = Axis.of(dist.group.WORLD)
    data = Axis.of(groups._get_data_parallel_group() if mpu is None else mpu.get_data_parallel_group())
    if data.size != world.size:
        raise ConfigError(
            f"mpu has {data.size} data-parallel ranks of {world.size}; only expert and data parallelism are supported, "
            "so that every rank must read data of its own."
        )
    expert = Axis.of(groups._get_expert_parallel_group(name))
    wanted, found = _expert_ranks(world, ep_size, data_before_expert), dist.get_process_group_ranks(expert.group)
    if found != wanted:
        raise MocteError(
            f"the ranks that share this rank's experts would be {wanted} by this config, and another engine in this "
            f"process has made groups of {found}; start this run in a process of its own."
        )
    # All ranks read different data; their own group has the time-out that the caller gave it.
    return Mesh(world, world, expert, Axis.of(groups._get_expert_data_parallel_group(name)), tensor=ALONE)


def _expert_ranks(world: Axis, ep_size: int, data_before_expert: bool) -> list[int]:
    """The ranks that share the experts of this one, as DeepSpeed lays them out."""
    if data_before_expert:
        apart = world.size // ep_size
        return [world.rank % apart + turn * apart for turn in range(ep_size)]
    first = world.rank // ep_size * ep_size
    return list(range(first, first + ep_size))


def require_axes_of(engine: Any, mesh: Mesh) -> None:
    """Stop where a DeepSpeed engine communicates over other ranks than the mesh has.

    Raises:
        MocteError: gradients would be summed, or tokens sent, over other ranks than samples and births.
    """
    asked = {"gradients": (engine.seq_data_parallel_group, mesh.data)}
    for name, module in engine.module.named_modules():
        if getattr(module, "ep_group", None) is not None:
            asked[f"tokens of {name}"] = (module.ep_group, mesh.expert)
    for what, (group, axis) in asked.items():
        wanted = dist.get_process_group_ranks(axis.group)
        found = None if group is None else dist.get_process_group_ranks(group)
        if found != wanted:
            raise MocteError(
                f"DeepSpeed sends {what} over the ranks {found}, the mesh has {wanted}. Another engine in this process "
                "has made other groups; start this run in a process of its own."
            )
