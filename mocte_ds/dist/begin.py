"""The process group of a run, whichever launcher has started it."""

import os
import platform
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

from mocte_ds.cpu_memory import keep_freed_memory
from mocte_ds.errors import ConfigError


def begin_group(**options: Any) -> None:
    """Make the default process group by the environment of the launcher (collective).

    When torchrun starts the ranks again it keeps its store, if its rendezvous is the static one: then a rank may read
    the address of one that has ended (torch 2.13). So every start after the first has keys of its own there.

    Args:
        **options: of deepspeed.init_distributed.

    Raises:
        ConfigError: the host has fewer GPUs than local ranks.
    """
    if not dist.is_initialized():
        _take_device()
    backend, start = get_accelerator().communication_backend_name(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore(f"restart_{start}", dist.TCPStore(address, port, timeout=default_pg_timeout))
        dist.init_process_group(backend, timeout=default_pg_timeout, world_size=world_size, rank=rank, store=store)
    deepspeed.init_distributed(backend, **options)


def _take_device() -> None:
    """Make the GPU of this local rank the current one: what collectives of NCCL and allocations go to."""
    accelerator, local = get_accelerator(), os.environ.get("LOCAL_RANK")
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
        return
    if local is None:
        return
    if int(local) >= accelerator.device_count():
        raise ConfigError(
            f"{platform.node()} has {accelerator.device_count()} devices, and a rank wants number {local}; start fewer "
            "ranks there, or look at CUDA_VISIBLE_DEVICES."
        )
    accelerator.set_device(int(local))
