"""The process groups of expert parallelism, made by DeepSpeed, and their end."""

import atexit
import time

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


def end_process_groups() -> None:
    """Take the process groups down, so that the process can end without an accident.

    A gloo thread lets go of the tensors of its last collective a moment after that collective has returned. If the
    interpreter is ending by then, the thread cannot get its lock, C++ terminates the process (exit code -6), and the
    launcher reports a finished run as failed. Without this, 3 of 15 short runs on two busy cores ended so.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gives the interpreter's lock to whoever waits for it


def end_process_groups_at_exit() -> None:
    """Call :func:`end_process_groups` when the script ends."""
    atexit.register(end_process_groups)
