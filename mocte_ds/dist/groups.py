"""The process groups of expert parallelism, made by DeepSpeed, and their end."""

import atexit

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


def destroy_at_exit() -> None:
    """Take the process groups down when the script ends, if it has not done so.

    A gloo group that is still there when the interpreter goes can abort the process (exit code -6), and the launcher
    then reports a finished run as failed.
    """

    def destroy() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(destroy)
