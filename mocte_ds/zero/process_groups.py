"""The process groups of expert parallelism, which DeepSpeed makes."""

import torch.distributed as dist
from deepspeed.utils import groups


def expert_parallel_rank(ep_size: int, data_before_expert: bool = False) -> int:
    """This rank's place among the ranks that share a block's experts; makes DeepSpeed's groups if they are missing.

    Args:
        ep_size: ranks that share the experts of a block.
        data_before_expert: DeepSpeed's `use_data_before_expert_parallelism`.
    """
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    return groups._get_expert_parallel_rank(name)


def expert_process_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks that share a block's experts, and the ranks that hold the same experts as this one."""
    name = f"ep_size_{ep_size}"
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
