"""Runs a function in N real processes that form a gloo group, with a time limit, stack dumps and no leftovers."""

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import multiprocessing.context
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from mocte_ds.dist.cpu_op import build_cpu_op, use_kernel_lock

GRACE = 5.0  # seconds that the other ranks get after one has failed
TAIL = 6000  # characters of each rank's output in an error message
_BUSY_PORT = "EADDRINUSE"
# Those from the model on are imported late, by transformers, by DeepSpeed's engine and where they are needed.
PRELOADED = ["torch", "deepspeed", "mocte_ds.engine", "transformers.models.llama.modeling_llama"]
PRELOADED += ["deepspeed.runtime.zero.muon.muon_optimizer", "mocte_ds.training.loop", "transformers.models.auto"]
PRELOADED += ["sklearn.cluster", "sklearn.metrics"]


class SpawnError(AssertionError):
    """A rank failed or the time ran out; the message holds every rank's output and stacks."""


def spawn(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    deepspeed: bool = False,
    backend: str = "gloo",
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a new gloo group and return what the ranks return.

    Args:
        function: importable (defined at the top level of a module) so that a fresh process finds it.
        world_size: number of processes.
        *args: pickled; the same for all ranks. The rank is ``torch.distributed.get_rank()``.
        timeout: seconds for start, work and end together. DeepSpeed's op is built before the clock starts.
        deepspeed: initialise through ``deepspeed.init_distributed`` instead of ``torch.distributed``.
        backend: of torch.distributed; with "nccl" DeepSpeed works on CUDA devices.

    Returns:
        Results in the order of the ranks.

    Raises:
        SpawnError: a rank raised, died, or did not end in time; all processes are gone by then.
    """
    try:
        payload = pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SpawnError(
            f"{function!r} and its arguments must be picklable; define it at module level: {error}"
        ) from error
    if deepspeed and backend == "gloo":
        build_cpu_op()
    for attempt in range(3):
        try:
            return _run(payload, world_size, timeout, deepspeed, backend)
        except SpawnError as error:
            # Another process may take the port between our looking and torch's binding.
            if attempt == 2 or not ("address already in use" in str(error).lower() or _BUSY_PORT in str(error)):
                raise
    raise AssertionError("unreachable")


def _run(payload: bytes, world_size: int, timeout: float, deepspeed: bool, backend: str) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="mocte-spawn-") as folder:
        port, processes = free_port(), []
        try:
            for rank in range(world_size):
                environment = environment_of(rank, world_size, port, backend)
                process = context().Process(
                    target=_child, args=(payload, folder, environment, timeout, deepspeed, backend), daemon=False
                )
                process.start()
                processes.append(process)
            problem = _wait(processes, time.monotonic() + timeout, timeout)
            if problem:
                dump_stacks(processes)
        finally:
            kill(processes)
        return _results(Path(folder), processes, problem)


@functools.cache
def context() -> multiprocessing.context.ForkServerContext:
    """Where processes come from: imports take many seconds; the server makes them once, for all ranks of all tests."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def _child(
    payload: bytes, folder: str, environment: dict[str, str], timeout: float, deepspeed: bool, backend: str
) -> None:
    """One rank, from start to end; its result or error goes into a file."""
    os.setpgid(0, 0)  # so that everything this rank starts can be ended with it
    # DeepSpeed collects garbage at every rebuild of a partition: a second each over all that the server has imported.
    gc.freeze()
    os.environ.update(environment)
    rank = int(environment["RANK"])
    log = open(Path(folder) / f"log_{rank}", "w", buffering=1)  # noqa: SIM115  lives as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    try:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        if deepspeed:
            import deepspeed.comm as comm

            use_kernel_lock()

            comm.init_distributed(backend, timeout=timedelta(seconds=timeout), dist_init_required=True)
        else:
            torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        function, args = pickle.loads(payload)
        outcome = (True, function(*args))
        # A rank that leaves early takes the store down, and the others would fail for no reason of their own.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        outcome = (False, traceback.format_exc())
    partial = Path(folder) / f"partial_{rank}"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder) / f"result_{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries must not keep a finished rank alive.
    os._exit(0 if outcome[0] else 1)


def _wait(processes: list, deadline: float, timeout: float) -> str | None:
    """Wait for all ranks; None when all ended well, else what is wrong."""
    problem, give_up = None, deadline
    while True:
        running = [rank for rank, process in enumerate(processes) if process.is_alive()]
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed and problem is None:
            problem = f"rank {failed[0]} failed"
            give_up = min(deadline, time.monotonic() + GRACE)
        if not running:
            return problem
        if time.monotonic() > give_up:
            return problem or f"ranks {running} did not end within {timeout:.0f} s"
        time.sleep(0.02)


def dump_stacks(processes: list) -> None:
    """Ask every living rank for the stacks of its threads, into its log."""
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    if alive:
        time.sleep(1.0)


def kill(processes: list) -> None:
    """End our ranks and what they have started; nothing else."""
    for process in processes:
        for end in (os.killpg, os.kill):  # a rank that has just started has no group of its own yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.is_alive():
                    end(process.pid, signal.SIGKILL)
        process.join(10)


def _results(folder: Path, processes: list, problem: str | None) -> list[Any]:
    outcomes = []
    for rank in range(len(processes)):
        file = folder / f"result_{rank}"
        outcomes.append(pickle.loads(file.read_bytes()) if file.exists() else (False, ""))
    if problem is None and all(good for good, _ in outcomes):
        return [result for _, result in outcomes]
    parts = [problem or "a rank left no result"]
    for rank, process in enumerate(processes):
        log = folder / f"log_{rank}"
        text = log.read_text(errors="replace")[-TAIL:] if log.exists() else ""
        parts.append(f"---- rank {rank}, exit code {process.exitcode} ----\n{text}")
    raise SpawnError("\n".join(parts))


def environment_of(rank: int, world_size: int, port: int, backend: str) -> dict[str, str]:
    """What a launcher would put into this rank's environment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),  # without it DeepSpeed starts `numactl` for every bucket of stage 3
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cuda" if backend == "nccl" else "cpu",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
