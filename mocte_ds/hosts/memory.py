"""Memory of this host that processes can still have, also where a container or a scheduler has set a limit."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can still be allocated: of the host, or of the tightest control group that this process is in.

    Pages of files that a control group keeps in memory count as available: they give way.
    """
    return min([psutil.virtual_memory().available, *_left()])


def _left() -> Iterator[int]:
    """What the control groups of both versions leave, from this process's own up to the root."""
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _up(CGROUPS, path, "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                yield from _up(CGROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _up(root: Path, path: str, limit: str, used: str, prefix: str) -> Iterator[int]:
    """What each group leaves; in a container the path may be that of the host, and only the root is there."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    for folder in [root, *(root.joinpath(*names[:depth]) for depth in range(1, len(names) + 1))]:
        with contextlib.suppress(OSError, ValueError, IndexError):
            most = int((folder / limit).read_text())  # "max": no limit here
            taken = int((folder / used).read_text())
            for line in (folder / "memory.stat").read_text().splitlines():
                name, value = line.split()[:2]
                if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                    taken -= int(value)
            yield most - taken
