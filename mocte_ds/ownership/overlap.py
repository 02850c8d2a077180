"""Whether what is read and what is written are the same place, or one inside of the other."""

import contextlib
import os
from pathlib import Path

from mocte_ds.errors import NotOurs
from mocte_ds.ownership.manifest import MANIFEST_FILE
from mocte_ds.ownership.marker import Marker


def require_apart(out: Path, *sources: Path, inside: bool = False) -> None:
    """Refuse a place to write to that is the place which is read, or overlaps with it, through links too.

    Args:
        out: file or folder that is written.
        sources: files or folders that are read.
        inside: whether a source may lie in ``out``, of which other parts are written.

    Raises:
        NotOurs: names both.
    """
    for source in sources:
        if _within(out, source) or (not inside and _within(source, out)):
            raise NotOurs(f"{out} and {source}, which is only read, overlap; write to a place of its own.")


def require_outside_whole(folder: Path) -> None:
    """Refuse a folder that is the whole output of a tool or a checkpoint, or lies in one, through links too.

    Raises:
        NotOurs: names that output.
    """
    folder = folder.absolute().resolve()
    for place in (folder, *folder.parents):
        if (place / MANIFEST_FILE).is_file() or _is_whole(place):
            raise NotOurs(
                f"{place} is the whole output of a tool, which other files would spoil. Nothing was changed; name "
                "another place."
            )


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(NotOurs):  # what it is about is not known any more
        marker = Marker.read(folder)
        return marker is not None and marker.whole
    return False


def _within(path: Path, other: Path) -> bool:
    """Whether a path is another one or lies in it; two names of one file or folder count as the same."""
    path, other = path.absolute().resolve(), other.absolute().resolve()
    if path == other or other in path.parents:
        return True
    try:
        there = other.stat()
    except OSError:
        return False
    return any(_same(place, there) for place in (path, *path.parents))


def _same(place: Path, there: os.stat_result) -> bool:
    try:
        return os.path.samestat(place.stat(), there)
    except OSError:
        return False
