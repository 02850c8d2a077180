"""Runs a function in several processes of this machine that form a process group: time limit, stacks, no leftovers."""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mocte_ds.cpu_memory import keep_freed_memory
from mocte_ds.dist.cpu_op import build_cpu_op, use_kernel_lock
from mocte_ds.errors import MocteError

ADDRESS = "127.0.0.1"
GRACE = 5.0
"""Seconds that the other processes get after one has failed."""
_TAIL = 6000  # characters of each rank's output in a message
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class RanksFailed(MocteError):
    """A rank failed or the time ran out; the message holds what is known of every rank."""


@dataclass(frozen=True)
class Ended:
    """How processes have ended.

    Attributes:
        codes: exit code of each; None: it had not ended and was killed.
        problem: which failed, or which did not end in time; None: all exit codes are 0.
        late: the time ran out.
    """

    codes: list[int | None]
    problem: str | None
    late: bool


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 120.0,
    device: str = "cpu",
    deepspeed: bool = False,
    preload: Sequence[str] = (),
    capture: bool = False,
    grace: float = GRACE,
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a new process group and return what the ranks return.

    Args:
        function: importable (defined at the top level of a module), so that a fresh process finds it.
        ranks: number of processes; on CUDA each takes the device of its number.
        *args: pickled; the same for all ranks. The rank is ``torch.distributed.get_rank()``.
        timeout: seconds for start, work and end together. The clock starts when DeepSpeed's op is built and the server
            has imported what it preloads.
        device: `cpu` or `cuda`.
        deepspeed: let DeepSpeed take over the process group at once, not when an engine is made.
        preload: see :func:`run_processes`.
        capture: keep what the ranks print for the message of an error; else it goes to stderr.
        grace: seconds that the others get after one has failed.

    Returns:
        Results in the order of the ranks.

    Raises:
        RanksFailed: a rank raised, died, or did not end in time; all processes are gone by then. With the message alone
            of a MocteError that a rank has raised.
    """
    try:
        payload = pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RanksFailed(
            f"{function!r} and its arguments must be picklable; define it at module level: {error}"
        ) from error
    if device == "cpu":
        build_cpu_op()
    limit = timedelta(seconds=timeout)
    # In this process, so that no port is looked for and then taken by somebody else, and no rank takes it down.
    store = dist.TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=limit)
    with tempfile.TemporaryDirectory(prefix="mocte-ranks-") as name:
        folder, numbers = Path(name), range(ranks)
        ended = run_processes(
            _rank,
            [(payload, str(folder / f"outcome_{rank}"), limit, device, deepspeed, capture) for rank in numbers],
            timeout,
            [environment_of(rank, ranks, store.port, device) for rank in numbers],
            [str(folder / f"log_{rank}") for rank in numbers] if capture else None,
            preload,
            grace,
        )
        return _results(ended, folder)


def run_processes(
    target: Callable[..., None],
    arguments: Sequence[tuple],
    timeout: float,
    environments: Sequence[dict[str, str]],
    logs: Sequence[str] | None = None,
    preload: Sequence[str] = (),
    grace: float = GRACE,
) -> Ended:
    """Run a function once in each of several processes and wait for their end; nothing that they start is left behind.

    Args:
        target: importable; may end by SystemExit, as a script does.
        arguments: of each process.
        timeout: seconds for all; then the stacks of those that still run go into their logs, and they are killed.
        environments: what each process finds in its environment besides that of this one.
        logs: files that get what each process prints; None: all of it goes to stderr.
        preload: modules that a server imports once, from which the processes are forked; none: fresh interpreters.
        grace: seconds that the others get after one has failed.
    """
    processes: list[BaseProcess] = []
    context = _context(tuple(preload))
    deadline = time.monotonic() + timeout
    try:
        for place, environment in enumerate(environments):
            entry = (target, arguments[place], environment, logs[place] if logs else None)
            processes.append(context.Process(target=_enter, args=entry, daemon=False))
            processes[-1].start()
        problem, late = _wait(processes, deadline, timeout, grace)
        if problem:
            _dump_stacks(processes)
        return Ended([process.exitcode for process in processes], problem, late)
    finally:
        _kill(processes)


def environment_of(rank: int, ranks: int, port: int, device: str = "cpu") -> dict[str, str]:
    """What a launcher would put into a rank's environment.

    Args:
        rank: its number.
        ranks: of the group.
        port: of the rendezvous; DeepSpeed also names shared memory by it, so that no two runs may have the same.
        device: `cpu` or `cuda`.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # without it DeepSpeed starts `numactl` for every bucket of stage 3
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
    }


@functools.cache
def _context(preload: tuple[str, ...]) -> ForkServerContext | SpawnContext:
    if not preload:
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(preload))
    # Imports may take longer than what is run afterwards: no clock begins before the server has them.
    first = server.Process(target=int)
    first.start()
    first.join()
    return server


def _enter(target: Callable[..., None], arguments: tuple, environment: dict[str, str], log: str | None) -> None:
    """One process, from start to end."""
    os.setpgid(0, 0)  # so that everything that it starts can be ended with it
    with contextlib.suppress(AttributeError):  # Linux only: it ends with the process that has started it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # DeepSpeed collects garbage at every rebuild of a partition: a second each over all that a server has imported.
    gc.freeze()
    os.environ.update(environment)
    if log is not None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 2)
    os.dup2(2, 1)  # without a log too: what DeepSpeed prints must not stand in front of the result of a command
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    code = 0
    try:
        target(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries must not keep a finished process alive.
    os._exit(code)


def _rank(payload: bytes, outcome: str, limit: timedelta, device: str, deepspeed: bool, capture: bool) -> None:
    """One rank of a group; its result, or the message of its error, goes into a file."""
    # Only now that the environment names the device.
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator, rank, ranks = get_accelerator(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if accelerator.device_name() != device:
        raise MocteError(f"DeepSpeed works on {accelerator.device_name()}, not {device}; set DS_ACCELERATOR={device}.")
    if device == "cuda":
        accelerator.set_device(rank)
    else:
        keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    torch.manual_seed(0)
    backend, port = accelerator.communication_backend_name(), int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(ADDRESS, port, is_master=False, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    if deepspeed:
        import deepspeed.comm as comm

        use_kernel_lock()
        comm.init_distributed(backend, timeout=limit)
    try:
        function, args = pickle.loads(payload)
        found = pickle.dumps((True, function(*args)))
    except MocteError as error:
        if capture:
            traceback.print_exc()
        _write(outcome, pickle.dumps((False, str(error))))
        sys.exit(1)
    # A rank that leaves early would end the last exchange of the others.
    dist.barrier(group=dist.group.WORLD)
    dist.destroy_process_group()
    _write(outcome, found)


def _write(path: str, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    Path(f"{path}.partial").write_bytes(content)
    os.rename(f"{path}.partial", path)


def _wait(processes: Sequence[BaseProcess], deadline: float, timeout: float, grace: float) -> tuple[str | None, bool]:
    """Wait for all; what is wrong, if anything, and whether the time ran out."""
    problem, give_up, before = None, deadline, list(range(len(processes)))
    while True:
        running = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in set(before) - set(running):
            _end_group(processes[rank])  # at once, while nobody else can have its number
        before = running
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        now = time.monotonic()
        if failed and problem is None:
            problem = f"rank {failed[0]} failed with exit code {processes[failed[0]].exitcode}"
            give_up = min(deadline, now + grace)
        if not running:
            return problem, False
        if now > give_up:
            late = f"ranks {running} did not end within {timeout:g} s; give them a longer time limit"
            return problem or late, problem is None
        time.sleep(0.02)


def _dump_stacks(processes: Sequence[BaseProcess]) -> None:
    """Ask every living process for the stacks of its threads, into its log."""
    alive = [process.pid for process in processes if process.is_alive() and process.pid is not None]
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    if alive:
        time.sleep(0.5)


def _kill(processes: Sequence[BaseProcess]) -> None:
    """End our processes and what they have started; nothing else."""
    for process in processes:
        if process.is_alive():
            _end_group(process)
            process.kill()  # one that has just started has no group of its own yet
        if process.pid is not None:
            process.join(10)


def _end_group(process: BaseProcess) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)


def _results(ended: Ended, folder: Path) -> list[Any]:
    """What the ranks have returned, or the error that says what is known of all."""
    outcomes = []
    for rank in range(len(ended.codes)):
        file = folder / f"outcome_{rank}"
        outcomes.append(pickle.loads(file.read_bytes()) if file.exists() else (False, None))
    if ended.problem is None and all(good for good, _ in outcomes):
        return [result for _, result in outcomes]
    parts = [ended.problem or "a rank left no result"]
    for rank, code in enumerate(ended.codes):
        log = folder / f"log_{rank}"
        if log.exists():
            said = log.read_text(errors="replace")[-_TAIL:]
            parts.append(f"---- rank {rank}, exit code {'none: killed' if code is None else code} ----\n{said}")
    failed = RanksFailed("\n".join(parts))
    if message := next((told for good, told in outcomes if not good and told), None):
        raise RanksFailed(message) from failed
    raise failed
