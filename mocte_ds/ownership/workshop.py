"""Folders for unfinished work, which a killed process leaves behind and the next one clears away."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mocte_ds.errors import NotOurs
from mocte_ds.ownership.durable import write_new
from mocte_ds.ownership.manifest import MANIFEST_FILE
from mocte_ds.ownership.marker import MARKER, Marker

PREFIX = ".mocte-work-"
NEW, OLD = "new", "old"
"""In a workshop: what is made, and what stood in its place before."""
_BEGUN = 60.0  # seconds in which a live process has said what its folder is


@contextlib.contextmanager
def workshop(parent: Path, target: str | None = None) -> Iterator[Path]:
    """An empty folder for unfinished work, gone at the end; what killed processes left beside it goes too.

    Args:
        parent: folder that it is made in; made if it is not there.
        target: name in that folder which the work is to get.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    clear(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    number = hold(folder, wait=True)
    try:
        begin(folder, target)
        yield folder
    finally:
        discard(folder)
        os.close(number)


def begin(folder: Path, target: str | None = None) -> None:
    """Say of a new folder that all of it is unfinished work of ours, as long as it has this name.

    Raises:
        OSError: it cannot be written.
    """
    write_new(folder / MARKER, Marker(work=folder.name, target=target).text().encode())


def hold(folder: Path, wait: bool = False) -> int:
    """Show other processes that somebody works in a folder, until the number that is returned is closed.

    Args:
        folder: the folder.
        wait: of a folder that was made this moment, where others only have a look.

    Raises:
        OSError: it is not there, or somebody works in it.
    """
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(number)
        raise
    except OSError:  # a file system without locks
        pass
    return number


def end(folder: Path) -> None:
    """Say no longer that the folder is unfinished work."""
    (folder / MARKER).unlink()


def discard(folder: Path) -> None:
    """Remove a folder that is ours, what shows it to be ours last: a kill leaves nothing that nobody may remove."""
    proof = (MANIFEST_FILE, MARKER)
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in proof:
                path.unlink(missing_ok=True)
        for name in proof:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def is_unfinished_work(folder: Path) -> bool:
    """Whether a folder says of itself that it is unfinished work of ours."""
    return _work_in(folder) is not None or _is_bare(folder)


def is_in_use(folder: Path) -> bool:
    """Whether a process works in a folder of unfinished work."""
    try:
        os.close(hold(folder))
    except BlockingIOError:
        return True
    return False


def clear(parent: Path) -> None:
    """Remove the unfinished work of killed processes from a folder; what stood in its place before comes back."""
    for folder in parent.iterdir():
        if folder.name.startswith(PREFIX):
            with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
                _clear(parent, folder)


def _clear(parent: Path, folder: Path) -> None:
    marker = _work_in(folder)
    if marker is None:
        if _is_bare(folder) and time.time() - folder.stat().st_mtime > _BEGUN:
            discard(folder)
        return
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if marker.target and (folder / OLD).exists() and not os.path.lexists(parent / marker.target):
            os.rename(folder / OLD, parent / marker.target)
        discard(folder)
    except OSError:  # somebody works in it, or a file system without locks
        return
    finally:
        os.close(number)


def _is_bare(folder: Path) -> bool:
    """Whether a folder of unfinished work was made and the next moment was a kill: nothing is in it."""
    if not folder.name.startswith(PREFIX) or folder.is_symlink() or not folder.is_dir():
        return False
    return all(path.name == MARKER and path.stat().st_size == 0 for path in folder.iterdir())


def _work_in(folder: Path) -> Marker | None:
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        marker = Marker.read(folder)
    except NotOurs:
        return None
    return marker if marker is not None and marker.work == folder.name else None
