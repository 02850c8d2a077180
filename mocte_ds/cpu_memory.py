"""Memory that a process on a CPU has freed stays with it, for the tensors of the next step."""

import ctypes
import os
from collections.abc import Mapping

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Tunable of glibc 2.35 and newer: memory in pages of 2 MB, where Linux grants them. Read when a process starts."""
TUNABLES = "GLIBC_TUNABLES"
"""Environment variable of glibc: NAME=VALUE, with colons between."""
_TRIM, _MAP = -1, -3  # <malloc.h>: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_ALL = 2**31 - 1
_MOST = 1 << 25
"""Largest M_MMAP_THRESHOLD that mallopt's manual names for 64 bits; versions of glibc that hold to it refuse more."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, in place of giving it back to the system.

    A tensor of 128 KiB or more is mapped for itself otherwise, or the top of the heap is cut off when it is freed: the
    system clears its pages anew in each step. That took a quarter of the quickstart's time. The process then holds the
    most that it has had at one time until it ends. Whoever has set one of these thresholds in the environment keeps it.

    Returns:
        Whether it was done; False with another C library, or where the environment says something else.
    """
    if sets_thresholds(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mapped = mallopt(_MAP, _ALL) or mallopt(_MAP, _MOST)
    return bool(mapped) and bool(mallopt(_TRIM, _ALL))


def sets_thresholds(environment: Mapping[str, str]) -> bool:
    """Whether an environment says from what size on memory goes back to the system."""
    tunables = environment.get(TUNABLES, "")
    return any(
        f"MALLOC_{name.upper()}_" in environment or f"malloc.{name}=" in tunables
        for name in ("mmap_threshold", "trim_threshold")
    )
