"""Runs a Python script on N ranks as a launcher would, in processes forked from the server of tests/spawn.py.

A fresh interpreter takes ten seconds and more to import what such a process finds imported. What is said of starting,
stopping and ending a launcher is tested with the real one: ``launch`` and ``launch.start`` of tests/e2e/conftest.py.
"""

import atexit
import faulthandler
import gc
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from mocte_ds.dist.cpu_op import build_cpu_op
from tests.spawn import context, dump_stacks, environment_of, free_port, kill

ROOT = Path(__file__).resolve().parents[1]
GRACE = 1.0  # seconds that the other ranks get after one has failed, as with DeepSpeed's launcher


def run_script(
    script: str, *arguments: object, processes: int = 2, timeout: float = 150.0, file_size: int | None = None
) -> tuple[int, str]:
    """Run a script of the repository as ``__main__`` on every rank, in the repository's root.

    Args:
        script: relative to the root; gets ``--local_rank`` as from DeepSpeed's launcher.
        *arguments: its command line.
        processes: ranks.
        timeout: seconds for all.
        file_size: bytes that no file may grow over; None: no limit.

    Returns:
        Exit code, of the first rank that failed or 0; what all ranks have printed.

    Raises:
        AssertionError: no end in time; all processes are gone by then.
    """
    build_cpu_op()
    words, port, ranks = [str(argument) for argument in arguments], free_port(), []
    with tempfile.TemporaryDirectory(prefix="mocte-script-") as folder:
        output = Path(folder) / "output"
        output.touch()
        try:
            for rank in range(processes):
                environment = environment_of(rank, processes, port, "gloo")
                target = (script, [f"--local_rank={rank}", *words], environment, str(output), file_size)
                ranks.append(context().Process(target=_rank, args=target, daemon=False))
                ranks[-1].start()
            in_time = _wait(ranks, time.monotonic() + timeout)
            if not in_time:
                dump_stacks(ranks)
        finally:
            codes = [rank.exitcode for rank in ranks]
            kill(ranks)
        said = output.read_text(encoding="utf-8", errors="replace")
    assert in_time, f"no end within {timeout:.0f} s:\n{said[-3000:]}"
    return next((code for code in codes if code), 0), said


def _wait(ranks: list, deadline: float) -> bool:
    """Wait for all ranks, or a moment after one has failed; False if the time ran out."""
    failed_at = None
    while any(rank.is_alive() for rank in ranks):
        now = time.monotonic()
        if failed_at is None and any(rank.exitcode for rank in ranks):
            failed_at = now
        if failed_at is not None and now > failed_at + GRACE:
            return True
        if now > deadline:
            return False
        time.sleep(0.02)
    return True


def _rank(script: str, words: list[str], environment: dict[str, str], output: str, file_size: int | None) -> None:
    """One rank, from start to end."""
    os.setpgid(0, 0)
    gc.freeze()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [script, *words]
    os._exit(_run(script))


def _run(script: str) -> int:
    """The exit code that an interpreter would have; its exit functions have run."""
    code = 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
