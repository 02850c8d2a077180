"""A folder that appears as a whole at the end or not at all, and never in the place of something else."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mocte_ds.errors import CheckpointError
from mocte_ds.ownership import replace_folder, require_apart, require_new_or_ours

_ROOM = 1 << 20  # bytes for lists and headers


def require_free(out: Path, source: Path | None, by: str) -> Path:
    """``out`` as a full path, if nothing but an earlier result of the tool is there.

    Args:
        out: folder to write.
        source: that is read; None: nothing on the disk is.
        by: the tool.

    Raises:
        NotOurs: something else is there, or the two overlap.
        CheckpointError: it cannot be looked at.
    """
    if source is not None:
        require_apart(out, source)
    try:
        return require_new_or_ours(out, by)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}.") from error


def require_room(out: Path, needed: int) -> None:
    """Refuse a disk with less room than a number of bytes, before anything is written.

    Raises:
        CheckpointError: says how much is needed and how much there is.
    """
    needed, free = needed + _ROOM, shutil.disk_usage(folder_above(out)).free
    if needed > free:
        raise CheckpointError(
            f"{out} needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free there. Nothing was written; make room "
            "or name a folder elsewhere."
        )


def folder_above(out: Path) -> Path:
    """The closest folder around a path that is there already."""
    return next(folder for folder in out.absolute().parents if folder.is_dir())


@contextlib.contextmanager
def finished_folder(out: Path, by: str) -> Iterator[Path]:
    """A folder that takes the place of ``out`` when all went well, and vanishes otherwise.

    Args:
        out: from :func:`require_free`.
        by: the tool, which the folder's marker names.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        with replace_folder(out, by) as pending:
            yield pending
            mask = os.umask(0)
            os.umask(mask)
            for path in pending.iterdir():
                if path.is_file():
                    path.chmod(0o666 & ~mask)  # safetensors leaves its files to the owner alone
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {out}: {error}. Nothing was changed there.") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
