"""Ways to damage a checkpoint, and to make its manifest agree with the damage, as somebody who tampers would."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest


def flip(path: Path, place: float, bit: int = 3) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    """Keep the first bytes of a file; a negative size takes bytes off its end."""
    path.write_bytes(path.read_bytes()[:size])


def swap(one: Path, other: Path) -> None:
    """Let two files change names."""
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def seal(folder: Path) -> None:
    """Write a manifest that agrees with the files that are there."""
    before = Manifest.read(folder)
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST_FILE]
    files = {name: hash_file(folder / name) for name in names}
    Manifest(before.run, before.step, before.world_size, files).write(folder)


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def plant(path: Path, made: Path, as_zip: bool = True) -> None:
    """Put code into a file that would make the folder ``made``."""
    attack: dict[str, Any] = {"module": Exploit(made)}
    if as_zip:
        torch.save(attack, path)
    else:
        path.write_bytes(pickle.dumps(attack, protocol=2))


def digest(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }
