"""What a disk gives to anybody: plain bytes written and synced, and read again, by several processes at once."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from mocte_ds.dist.collectives import wait_for_all
from mocte_ds.dist.mesh import mesh_of_processes

_PIECE = 1 << 22  # bytes


def measure_disk(folder: str, size: int, repeats: int) -> dict[str, Any]:
    """Write, read and hash this rank's share of some bytes (collective).

    Args:
        folder: on the disk.
        size: bytes of all ranks together.
        repeats: of everything; the shortest counts.

    Returns:
        Seconds: "write" (with the wait for the disk), "read" (not from memory), "sha256" (in memory).
    """
    world = mesh_of_processes().world
    path, pieces = Path(folder) / f"plain {world.rank}", max(1, size // world.size // _PIECE)
    found: dict[str, list[float]] = {"write": [], "read": [], "sha256": []}
    for _ in range(repeats):
        piece = os.urandom(_PIECE)
        wait_for_all(world)  # all start at once
        started = time.perf_counter()
        with open(path, "wb") as file:
            for _piece in range(pieces):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        found["write"].append(time.perf_counter() - started)
        forget(path)
        wait_for_all(world)  # all start at once
        started = time.perf_counter()
        with open(path, "rb") as file:
            while file.read(_PIECE):
                pass
        found["read"].append(time.perf_counter() - started)
        wait_for_all(world)  # all start at once
        started, digest = time.perf_counter(), hashlib.sha256()
        for _ in range(pieces):
            digest.update(piece)
        found["sha256"].append(time.perf_counter() - started)
        path.unlink()
    return {"bytes": pieces * _PIECE, "seconds": {name: min(times) for name, times in found.items()}}


def forget(path: Path) -> None:
    """Let the kernel drop what it keeps of a file, or of all files of a folder, in memory; they must be on the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        number = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)
