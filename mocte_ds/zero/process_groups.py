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
    return Mesh(world, data, expert, Axis.of(groups._get_expert_data_parallel_group(name)), tensor=ALONE)


def require_axes_of(engine: Any, mesh: Mesh) -> None:
    """Stop where a DeepSpeed engine sums gradients over other ranks than the mesh has for data.

    Raises:
        MocteError: samples and gradients would be of different ranks.
    """
    found = dist.get_process_group_ranks(engine.data_parallel_group)
    if found != dist.get_process_group_ranks(mesh.data.group):
        raise MocteError(
            f"DeepSpeed's data-parallel ranks are {found}, the mesh's are "
            f"{dist.get_process_group_ranks(mesh.data.group)}. Another engine in this process has made other groups; "
            "start this run in a process of its own."
        )
