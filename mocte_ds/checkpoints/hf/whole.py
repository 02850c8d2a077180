"""A folder that appears as a whole at the end or not at all, and never in the place of something else."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mocte_ds.errors import CheckpointError, ConfigError

_ROOM = 1 << 20  # bytes for lists and headers


def require_free(out: Path, source: Path, mark: str) -> Path:
    """``out`` as a full path, if nothing but an earlier result is there.

    Args:
        out: folder to write.
        source: that is read.
        mark: name of the file that tells an earlier result.

    Raises:
        ConfigError: something else is there, or the two overlap.
        CheckpointError: it cannot be looked at.
    """
    out, source = out.absolute().resolve(), source.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise ConfigError(f"{out} and {source}, which is read, overlap; write to a folder of its own.")
    try:
        if out.is_dir():
            taken = any(out.iterdir()) and not (out / mark).is_file()
        else:
            taken = out.exists()
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}.") from error
    if taken:
        raise ConfigError(f"{out} holds something else than this tool writes (no {mark}); name another folder.")
    return out


def require_room(out: Path, needed: int) -> None:
    """Refuse a disk with less room than a number of bytes, before anything is written.

    Raises:
        CheckpointError: says how much is needed and how much there is.
    """
    there = next(folder for folder in out.absolute().parents if folder.is_dir())
    needed, free = needed + _ROOM, shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"{out} needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free there. Nothing was written; make room "
            "or name a folder elsewhere."
        )


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all went well, and vanishes otherwise.

    Raises:
        CheckpointError: it could not be written.
    """
    pending = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        pending.mkdir(parents=True)
        yield pending
        mask = os.umask(0)
        os.umask(mask)
        for path in pending.iterdir():
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors leaves its files to the owner alone
        _swap(pending, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {out}: {error}. Nothing was changed there.") from error
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _swap(pending: Path, out: Path) -> None:
    """Put a folder in another one's place, or leave that one where it is."""
    if not out.exists():
        os.replace(pending, out)
        return
    old = out.with_name(f"{out.name}.{os.getpid()}.old")
    os.replace(out, old)
    try:
        os.replace(pending, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
