"""Runs a function in N real processes with gloo; time limits, stack dumps of all ranks, nothing left behind."""

import faulthandler
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing


def spawn(
    function: Callable, world_size: int, *args: Any, timeout: float = 120.0, deepspeed: bool = False
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank.

    Args:
        function: defined at the top of a module.
        world_size: number of processes.
        *args: picklable.
        timeout: seconds after which all ranks dump their stacks and are ended.
        deepspeed: initialise through deepspeed.comm instead of torch.distributed.

    Returns:
        Results by rank.

    Raises:
        AssertionError: a rank failed or the time is over; carries the stacks of all ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        setup = (folder, port, timeout, deepspeed)
        processes = [context.Process(target=_rank, args=(r, world_size, function, args, setup)) for r in range(world_size)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout + 15
        while time.monotonic() < deadline and any(p.is_alive() for p in processes):
            if any(p.exitcode not in (None, 0) for p in processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others may be waiting for the dead one
            time.sleep(0.05)
        late = [p for p in processes if p.is_alive()]
        for process in late:
            process.kill()
        for process in processes:
            process.join()
        outputs = [Path(folder, f"result{rank}") for rank in range(world_size)]
        if late or any(p.exitcode for p in processes) or not all(path.exists() for path in outputs):
            logs = [f"--- rank {r} (exit {p.exitcode})\n{_read(folder, r)}" for r, p in enumerate(processes)]
            raise AssertionError(f"{function.__name__} failed on {world_size} ranks\n" + "\n".join(logs))
        return [pickle.loads(path.read_bytes()) for path in outputs]


def _read(folder: str, rank: int) -> str:
    path = Path(folder, f"log{rank}")
    return path.read_text(errors="replace")[-6000:] if path.exists() else "no output"


def _rank(rank: int, world_size: int, function: Callable, args: tuple, setup: tuple) -> None:
    folder, port, timeout, deepspeed = setup
    log = open(Path(folder, f"log{rank}"), "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(timeout, exit=True, file=log)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    try:
        import torch

        torch.set_num_threads(1)
        if deepspeed:
            import deepspeed as ds

            ds.init_distributed("gloo")
        else:
            torch.distributed.init_process_group("gloo")
        result = function(rank, world_size, *args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()
        log.flush()
    os._exit(0)
