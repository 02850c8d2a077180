"""The mesh of a run's ranks, of the process groups that DeepSpeed makes."""

from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

from mocte_ds.dist.mesh import ALONE, Axis, Mesh
from mocte_ds.errors import ConfigError, MocteError


def make_tensor_groups(ranks: int) -> Any:
    """What DeepSpeed is to take for `mpu` where tensor parallelism cuts matrices (collective).

    Neighbours share a tensor group; ranks of the same place in theirs are a data-parallel group.

    Args:
        ranks: of a tensor group; 1: no tensor parallelism.

    Returns:
        DeepSpeed's module of groups; None where nothing is cut.

    Raises:
        ConfigError: they do not divide the ranks of the run.
        MocteError: another engine in this process has made other groups.
    """
    if ranks == 1:
        return None
    world = Axis.of(dist.group.WORLD)
    if world.size % ranks:
        raise ConfigError(f"tensor_parallel.autotp_size = {ranks} does not divide the {world.size} ranks of the run.")
    groups._init_tp_mesh_device(ranks)
    first = world.rank // ranks * ranks
    _require_ranks(groups.get_tensor_model_parallel_group(), list(range(first, first + ranks)), "tensor group")
    _require_ranks(groups.get_data_parallel_group(), list(range(world.rank % ranks, world.size, ranks)), "data group")
    return groups


def make_mesh(ep_size: int, data_before_expert: bool = False, mpu: Any = None, tensor_ranks: int = 1) -> Mesh:
    """The mesh of a run; makes DeepSpeed's groups if they are missing (collective).

    The experts are spread over all ranks of the run, whichever of them share the matrices of attention: where tensor
    ranks read the same tokens, each sends its own share of them (mocte_ds/dist/token_shares.py).

    Args:
        ep_size: ranks that share the experts of a bank.
        data_before_expert: DeepSpeed's `use_data_before_expert_parallelism`.
        mpu: the caller's parallel groups, as DeepSpeed takes them; None: all ranks read different data.
        tensor_ranks: of :func:`make_tensor_groups`, whose result ``mpu`` then is.

    Raises:
        ConfigError: the data-parallel ranks of ``mpu`` are not all ranks.
        MocteError: another engine in this process has made other groups.
    """
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    world = Axis.of(dist.group.WORLD)
    data = Axis.of(groups._get_data_parallel_group() if mpu is None else mpu.get_data_parallel_group())
    if data.size * tensor_ranks != world.size:
        raise ConfigError(
            f"mpu has {data.size} data-parallel ranks of {world.size}; only data and expert parallelism, and "
            "DeepSpeed's own tensor parallelism (tensor_parallel.autotp_size), are supported."
        )
    expert = Axis.of(groups._get_expert_parallel_group(name))
    _require_ranks(expert.group, _expert_ranks(world, ep_size, data_before_expert), "expert group")
    expert_data = Axis.of(groups._get_expert_data_parallel_group(name))
    if tensor_ranks > 1:
        return Mesh(world, data, expert, expert_data, Axis.of(groups.get_tensor_model_parallel_group()))
    # All ranks read different data; their own group has the time-out that the caller gave it.
    return Mesh(world, world, expert, expert_data, tensor=ALONE)


def _require_ranks(group: Any, wanted: list[int], kind: str) -> None:
    """Stop where a group that another engine has made is not the one that this config asks for."""
    found = dist.get_process_group_ranks(group)
    if found != wanted:
        raise MocteError(
            f"the {kind} of this rank would be {wanted} by this config, and another engine in this process has made "
            f"groups of {found}; start this run in a process of its own."
        )


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
