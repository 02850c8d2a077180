"""Folders that are the whole output of a tool: they appear at the end, in place of an earlier one or of nothing."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mocte_ds.errors import NotOurs
from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.marker import MARKER, Entry, Marker
from mocte_ds.ownership.overlap import require_outside_whole
from mocte_ds.ownership.proof import few, strangers
from mocte_ds.ownership.workshop import NEW, OLD, clear, workshop


def require_new_or_ours(out: Path, by: str) -> Path:
    """``out`` as a full path without links, if nothing but an earlier output of the tool is there.

    Raises:
        NotOurs: something else is there, of which it names the first few files; or it lies in the whole output of a
            tool.
        OSError: it cannot be looked at.
    """
    out = out.absolute().resolve()
    require_outside_whole(out.parent)
    if out.parent.is_dir():
        clear(out.parent)  # an earlier output may come back
    if not os.path.lexists(out):
        return out
    found = f"{out} is a file" if not out.is_dir() else few(strangers(out, by))
    if found:
        raise NotOurs(
            f"{out} holds something else than {by} wrote: {found}. Nothing was changed; name another folder, or move "
            "away or remove by yourself what you do not need."
        )
    return out


def mark(folder: Path, by: str, work: Path) -> None:
    """List everything in a folder as the whole output of a tool.

    Args:
        folder: with everything in it.
        by: the tool.
        work: a folder of unfinished work in the same file system.

    Raises:
        OSError: the marker cannot be written.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    entries = {path.relative_to(folder).as_posix(): Entry(by, (hash_file(path),)) for path in files}
    Marker(entries, whole=True).write(folder, work)


@contextlib.contextmanager
def replace_folder(out: Path, by: str) -> Iterator[Path]:
    """A folder that takes the place of ``out`` when all went well, and vanishes otherwise.

    Args:
        out: from :func:`require_new_or_ours`.
        by: the tool.

    Raises:
        NotOurs: something came into ``out`` meanwhile.
        OSError: it cannot be written.
    """
    with workshop(out.parent, out.name) as work:
        new, old = work / NEW, work / OLD
        new.mkdir()
        yield new
        mark(new, by, work)
        with contextlib.suppress(FileNotFoundError):
            os.rename(out, old)
        try:
            found = few(strangers(old, by)) if old.exists() else ""
            if found:
                raise NotOurs(f"{out} was changed meanwhile: {found}. Nothing was replaced; name another folder.")
            os.rename(new, out)
        except BaseException:
            if old.exists():
                os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
