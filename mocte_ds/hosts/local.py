"""Starts a script on several processes of this machine through DeepSpeed's launcher: its GPUs, or two on a CPU."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mocte_ds.cpu_memory import HUGE_PAGES, TUNABLES

_WITHOUT_GPU = 2


def gpus() -> int:
    """GPUs that this machine has."""
    import torch

    return torch.cuda.device_count()


def usual_count(most: int | None = None) -> int:
    """Processes of a start that names no number: one for each GPU, at most ``most``; two where there is none."""
    return min(most or gpus(), gpus()) or _WITHOUT_GPU


def command(script: Path, options: Sequence[str], processes: int, devices: Sequence[int] | None = None) -> list[str]:
    """What starts a script on several processes.

    Args:
        script: every process runs it.
        options: of the script.
        processes: how many.
        devices: GPUs, one for each process; None: the first ones, or none at all.
    """
    where = ["--num_accelerators", str(processes)]
    if devices is not None:
        where = ["--include", "localhost:" + ",".join(map(str, devices))]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    return [*launcher, "--master_port", str(_free_port()), *where, str(script), *options]


def environment(processes: int) -> dict[str, str]:
    """Of such a start. Without a GPU processes share the cores: more threads than cores make all of them slow.

    And their tensors lie in large pages there, where Linux grants them.
    """
    values = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    if not gpus():
        values.setdefault("DS_ACCELERATOR", "cpu")
        values.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        values.setdefault(TUNABLES, HUGE_PAGES)
    return values


def run(words: Sequence[str], values: Mapping[str, str]) -> int:
    """Run a program to its end; Ctrl-C, SIGTERM and SIGHUP go to it and all that it started, which may save.

    Args:
        words: program and options.
        values: its environment.

    Returns:
        Its exit code, or 128 and the number of the signal that ended it.
    """
    child: subprocess.Popen | None = None
    early: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        if child is None:
            early.append(number)
        elif child.poll() is None:
            os.killpg(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        child = subprocess.Popen(words, env=dict(values), start_new_session=True)
        for number in early:
            os.killpg(child.pid, number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    """For shell scripts: python -m mocte_ds.hosts.local [SCRIPT options]; prints the number without a script."""
    processes = usual_count(2)
    if len(sys.argv) < 2:
        print(processes)
        return 0
    return run(command(Path(sys.argv[1]), sys.argv[2:], processes), environment(processes))


if __name__ == "__main__":
    sys.exit(main())
