"""The names of DeepSpeed's shared memory on a CPU, which DeepSpeed itself never removes."""

import os
from pathlib import Path

import torch.distributed as dist

from mocte_ds.dist.collectives import wait_for_all
from mocte_ds.dist.mesh import mesh_of_processes

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux shows shared memory by name."""


def forget_shared_memory() -> None:
    """Remove the name of this rank's buffer, so that the system frees it when the last process of the run ends.

    DeepSpeed's op `deepspeed_shm_comm` makes a buffer of 66 MiB per rank where all ranks run on one host, and leaves it
    in memory when the run ends, however it ends: after some 150 runs of two ranks, 20 GB of a machine were gone. Its
    name holds the user, the address and port of the run's rendezvous, and the rank, so that it is this process's own.
    The ranks keep what they have mapped; hence the barrier, after which all of them have.
    """
    world = mesh_of_processes().world
    if world.group is None or dist.get_backend(world.group) == "nccl":
        return
    if world.size != int(os.environ.get("LOCAL_SIZE") or 0):
        return
    wait_for_all(world)
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)
