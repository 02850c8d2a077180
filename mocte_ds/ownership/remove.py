"""Removes a folder of ours, if everything in it is shown to be ours; or what is ours in a folder of others."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mocte_ds.errors import MocteError, NotOurs
from mocte_ds.ownership.manifest import MANIFEST_FILE
from mocte_ds.ownership.marker import MARKER, Marker
from mocte_ds.ownership.proof import few, look_through, trouble
from mocte_ds.ownership.workshop import clear, discard, workshop

_PROOF = (MANIFEST_FILE, MARKER)


def remove(folder: Path) -> None:
    """Remove a folder that tools filled, all of it or nothing.

    Args:
        folder: need not be there.

    Raises:
        NotOurs: it holds something that is not shown to be ours; names the first few files.
        MocteError: it cannot be removed.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise NotOurs(f"{folder} is a link or a file, not a folder. Nothing was removed; name the folder itself.")
    try:
        clear(folder)
        ours = _require_all_ours(folder)
        # What proves the rest goes last, so that a kill leaves nothing without a proof.
        for path in sorted(ours, key=lambda path: (-len(path.parts), path.name in _PROOF, path.name == MARKER)):
            if path.is_dir():
                discard(path)
            else:
                path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        _remove_empty(folder)
    except OSError as error:
        raise MocteError(f"{folder} cannot be removed: {error}. Mend that, or name another folder.") from error


def remove_listed(folder: Path) -> list[str]:
    """Remove the files that the marker of a folder lists and that are as we wrote them; all others stay.

    Returns:
        Names of what was removed.
    """
    if folder.is_symlink() or not folder.is_dir():
        return []
    try:
        marker = Marker.read(folder)
    except NotOurs:
        return []
    names = [name for name in marker.files if not trouble(folder, name, marker)] if marker else []
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if marker:
        with workshop(folder) as work:
            marker.with_files({}, without=names).write(folder, work)
    return names


def _require_all_ours(folder: Path) -> list[Path]:
    """All files in a folder, if each is shown to be ours."""
    ours: list[Path] = []

    def problems() -> Iterator[str]:
        for path, problem in look_through(folder):
            ours.append(path)
            if problem:
                yield problem

    bare = Marker.read(folder) is None and any(folder.iterdir())
    found = f"it has no {MARKER}, which the tools write" if bare else few(problems())
    if found:
        raise NotOurs(
            f"{folder} is not removed, since not all of it is shown to be the tools' own: {found}. Nothing was "
            "removed; move that away or remove it by yourself, and start again."
        )
    return ours


def _remove_empty(folder: Path) -> None:
    """Remove a folder in which there is nothing but empty folders.

    Raises:
        OSError: something came into it meanwhile.
    """
    if folder.is_dir():
        for path, _, _ in os.walk(folder, topdown=False):
            os.rmdir(path)
