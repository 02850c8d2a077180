"""Runs a Python script on N ranks as a launcher would, in processes forked from the server of tests/spawn.py.

A fresh interpreter takes ten seconds and more to import what such a process finds imported. What is said of starting,
stopping and ending a launcher is tested with the real one: ``launch`` and ``launch.start`` of tests/e2e/conftest.py.
"""

import atexit
import os
import resource
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

from mocte_ds.dist.cpu_op import build_cpu_op
from mocte_ds.dist.processes import environment_of, run_processes
from tests.spawn import PRELOADED, free_port

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
    words, port, ranks = [str(argument) for argument in arguments], free_port(), range(processes)
    with tempfile.TemporaryDirectory(prefix="mocte-script-") as folder:
        output = Path(folder) / "output"
        commands = [(script, [f"--local_rank={rank}", *words], file_size) for rank in ranks]
        environments = [environment_of(rank, processes, port) for rank in ranks]
        ended = run_processes(_run, commands, timeout, environments, [str(output)] * processes, PRELOADED, GRACE)
        said = output.read_text(encoding="utf-8", errors="replace")
    assert not ended.late, f"{ended.problem}:\n{said[-3000:]}"
    return next((code for code in ended.codes if code), 0), said


def _run(script: str, words: list[str], file_size: int | None) -> None:
    """One rank; its exit functions have run at the end."""
    os.chdir(ROOT)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [script, *words]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:
        traceback.print_exc()  # before what the exit functions say, as an interpreter does
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
