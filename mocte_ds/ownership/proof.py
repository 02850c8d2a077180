"""What in a folder is not shown to be ours: foreign, or changed since we wrote it."""

import fnmatch
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mocte_ds.errors import MocteError, NotOurs
from mocte_ds.ownership.facts import FileFacts, hash_file
from mocte_ds.ownership.growth import has_grown
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from mocte_ds.ownership.marker import MARKER, Entry, Marker
from mocte_ds.ownership.workshop import is_in_use, is_unfinished_work

LATEST = "latest"
LONGEST_NAME = 255  # bytes of a file, in every common file system
_SHOWN = 3

Known = list[tuple[Path, Marker]]
"""Folders with their markers, the nearest one first."""


def trouble(folder: Path, name: str, marker: Marker | None, by: str | None = None) -> str | None:
    """Why a file may not be replaced or removed; None: it is not there, or it is what we wrote.

    Args:
        folder: that has the marker.
        name: of the file, relative to it.
        marker: of the folder.
        by: the tool that must have written it; None: any of ours.
    """
    path = folder / name
    link = next((part for part in [path, *path.parents][: len(Path(name).parts)] if part.is_symlink()), None)
    if link is not None:
        return f"{link} is a link"
    if not os.path.lexists(path):
        return None
    entry = marker.files.get(name) if marker else None
    if entry is None:
        return f"{path} was not written by mocte-ds"
    if by is not None and entry.by != by:
        return f"{path} was written by {entry.by}"
    return None if _unchanged(path, entry) else f"{path} was changed since {entry.by} wrote it"


def look_through(folder: Path, by: str | None = None) -> Iterator[tuple[Path, str | None]]:
    """Every file in a folder, and why it is not shown to be ours (None: it is); links are never followed.

    A folder of unfinished work of ours counts as one file.

    Args:
        folder: with everything in it.
        by: the tool that must have written all of it; None: any of ours, checkpoints included.
    """
    return _look_through(folder, [], by)


def strangers(folder: Path, by: str | None = None) -> Iterator[str]:
    """What of :func:`look_through` is not shown to be ours, one by one."""
    return (problem for _, problem in look_through(folder, by) if problem)


def is_checkpoint_of_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose files are what its manifest says, and holds nothing else.

    Raises:
        OSError: it cannot be read.
    """
    plain = folder.is_dir() and not folder.is_symlink()
    return plain and bool(_listed(folder)) and not any(strangers(folder))


def few(found: Iterable[str]) -> str:
    """The first few of some texts, and whether there are more."""
    first = list(itertools.islice(found, _SHOWN + 1))
    return "; ".join(first[:_SHOWN]) + ("; and more" if len(first) > _SHOWN else "")


def _look_through(folder: Path, known: Known, by: str | None) -> Iterator[tuple[Path, str | None]]:
    try:
        marker = Marker.read(folder)
    except NotOurs:
        yield folder / MARKER, f"{folder / MARKER} was changed"
        return
    known = [(folder, marker), *known] if marker else known
    listed = {} if by is not None else _listed(folder)
    # Files first: a folder of somebody else is told from ours without a walk through all of it.
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_symlink():
            yield path, f"{path} is a link"
        elif path.is_dir() and not is_unfinished_work(path):
            yield from _look_through(path, known, by)
        elif path.is_dir():
            yield path, f"{path} is in use" if is_in_use(path) else None
        elif path.name == MARKER and marker is not None:
            yield path, None
        else:
            yield path, _trouble_with(path, known, listed, by)


def _trouble_with(path: Path, known: Known, listed: dict[str, FileFacts], by: str | None) -> str | None:
    """Why a file is not shown to be ours, by the markers above it or by the checkpoint that it belongs to."""
    for folder, marker in known:
        name = path.relative_to(folder).as_posix()
        if name in marker.files:
            return trouble(folder, name, marker, by)
        if by is None and any(
            fnmatch.fnmatchcase(name, known) and _unchanged(path, e) for known, e in patterns(marker)
        ):
            return None
    if path.name in listed:
        same = path.is_file() and hash_file(path) == listed[path.name]
        return None if same else f"{path} was changed since it was saved"
    if by is None and ((listed and path.name == MANIFEST_FILE) or (path.name == LATEST and _names_ours(path))):
        return None
    return f"{path} was not written by mocte-ds"


def patterns(marker: Marker) -> list[tuple[str, Entry]]:
    """Entries of files whose names were not known yet when they were listed."""
    return [(name, entry) for name, entry in marker.files.items() if "*" in name and entry.grows]


def _listed(folder: Path) -> dict[str, FileFacts]:
    """What the manifest of a checkpoint says of its files; nothing where there is none, or a damaged one."""
    if not (folder / MANIFEST_FILE).is_file():
        return {}
    try:
        return dict(Manifest.read(folder).files)
    except MocteError:
        return {}


def is_pointer(path: Path) -> bool:
    """Whether a file `latest` is what DeepSpeed and we write: the name of a checkpoint and nothing else."""
    try:
        if path.is_symlink() or path.stat().st_size > LONGEST_NAME + 1:
            return False
        tag = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return False
    return len(tag.split()) == 1 and "/" not in tag


def _names_ours(path: Path) -> bool:
    """Whether a file `latest` names a checkpoint of ours beside it."""
    return is_pointer(path) and bool(_listed(path.parent / path.read_text(encoding="utf-8").strip()))


def _unchanged(path: Path, entry: Entry) -> bool:
    if not path.is_file():
        return False
    if entry.grows:
        return any(has_grown(path, facts) for facts in entry.versions)
    if path.stat().st_size not in {facts.bytes for facts in entry.versions}:
        return False
    return hash_file(path) in entry.versions
