"""Runs a function in several fresh processes that form a process group on this machine, with a time limit."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import multiprocessing

from mocte_ds.dist.cpu_op import build_cpu_op
from mocte_ds.errors import MocteError

_GRACE = 5.0  # seconds that a process gets to end after it was asked to


def run_ranks(
    function: Callable[..., dict[str, Any]], ranks: int, device: str, seconds: float, *args: Any
) -> list[dict[str, Any]]:
    """Call ``function(*args)`` on every rank of a new process group and return what the ranks return.

    Args:
        function: importable; returns plain JSON values. DeepSpeed takes over the process group when it starts.
        ranks: number of processes; on CUDA each takes the device of its number.
        device: `cpu` or `cuda`.
        seconds: time limit; DeepSpeed's op is built before the clock starts.
        *args: pickled; the same for all ranks.

    Raises:
        MocteError: a rank raised one, or the time ran out; all processes are gone by then.
    """
    with tempfile.TemporaryDirectory(prefix="mocte-ranks-") as folder, _environment(ranks, device):
        if device == "cpu":
            build_cpu_op()
        context = multiprocessing.start_processes(
            _rank, (function, args, ranks, folder, seconds), nprocs=ranks, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise MocteError(f"the {ranks} ranks did not end within {seconds:g} s; give a longer --time-limit.")
        except multiprocessing.ProcessExitedException:
            _raise_error(Path(folder))
            raise
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.terminate()
                    process.join(_GRACE)
                    process.kill()
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _raise_error(folder: Path) -> None:
    """Raise the first message that a rank left for the user, if one did."""
    for path in sorted(folder.glob("*.error")):
        raise MocteError(path.read_text(encoding="utf-8"))


def _rank(
    number: int, function: Callable[..., dict[str, Any]], args: tuple, ranks: int, folder: str, seconds: float
) -> None:
    """One process, from start to end."""
    os.dup2(2, 1)  # what DeepSpeed prints must not stand in front of the result of the command
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    import torch
    from deepspeed.accelerator import get_accelerator

    from mocte_ds.dist.end import end_process_groups

    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        accelerator.set_device(number)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    torch.distributed.init_process_group(
        accelerator.communication_backend_name(),
        timeout=timedelta(seconds=seconds),
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=ranks,
    )
    try:
        result = function(*args)
    except MocteError as error:
        (Path(folder) / f"{number}.error").write_text(str(error), encoding="utf-8")
        sys.exit(1)  # ends the others too, which may wait for this one
    (Path(folder) / f"{number}.json").write_text(json.dumps(result), encoding="utf-8")
    end_process_groups()


@contextmanager
def _environment(ranks: int, device: str) -> Iterator[None]:
    """What a launcher tells its ranks, for the processes that are started meanwhile."""
    before = dict(os.environ)
    # The ranks meet in a file; DeepSpeed names shared memory by the address and the port, which no two runs may share.
    os.environ.update(
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(os.getpid()),
        DS_ACCELERATOR=device,
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
