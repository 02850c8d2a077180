"""The process group of a run, whichever launcher has started it."""

import os
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout


def begin_group(**options: Any) -> None:
    """Make the default process group by the environment of the launcher (collective).

    When torchrun starts the ranks again it keeps its store, if its rendezvous is the static one: then a rank may read
    the address of one that has ended (torch 2.13). So every start after the first has keys of its own there.

    Args:
        **options: of deepspeed.init_distributed.
    """
    backend, start = get_accelerator().communication_backend_name(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore(f"restart_{start}", dist.TCPStore(address, port, timeout=default_pg_timeout))
        dist.init_process_group(backend, timeout=default_pg_timeout, world_size=world_size, rank=rank, store=store)
    deepspeed.init_distributed(backend, **options)
