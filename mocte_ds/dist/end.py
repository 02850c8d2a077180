"""The end of the process groups."""

import atexit
import contextlib
import time

import torch.distributed as dist


def end_process_groups() -> None:
    """Take the process groups down, so that the process can end without an accident.

    A gloo thread lets go of the tensors of its last collective a moment after that collective has returned. If the
    interpreter is ending by then, the thread cannot get its lock, C++ terminates the process (exit code -6), and the
    launcher reports a finished run as failed. Without this, 3 of 15 short runs on two busy cores ended so.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gives the interpreter's lock to whoever waits for it


def end_process_groups_at_exit() -> None:
    """Call :func:`end_process_groups` when the script ends."""
    atexit.register(_end_quietly)


def _end_quietly() -> None:
    # Where another rank is gone, its end is told already.
    with contextlib.suppress(Exception):
        end_process_groups()
