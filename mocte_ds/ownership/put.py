"""Writes files into a folder that may hold files of others: each whole or not at all, and never over one of theirs."""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from mocte_ds.errors import NotOurs
from mocte_ds.ownership.durable import write_new
from mocte_ds.ownership.facts import FileFacts, hash_file
from mocte_ds.ownership.marker import Entry, Marker, locked, safe_name
from mocte_ds.ownership.overlap import require_outside_whole
from mocte_ds.ownership.proof import few, trouble
from mocte_ds.ownership.workshop import NEW, workshop

_KEPT = "{}.kept{}"
_ADVICE = "Nothing was changed. Name another place, or move away or remove by yourself what you do not need."


def require_ours(folder: Path, names: Iterable[str], by: str) -> None:
    """Refuse names in a folder under which something else lies than what a tool wrote there.

    Args:
        folder: need not be there.
        names: of files, relative to it.
        by: the tool.

    Raises:
        NotOurs: names the first few, and says what to do.
    """
    require_outside_whole(folder)
    if not folder.is_dir():
        return  # not there; or a file, which the system refuses when it is written to
    marker = Marker.read(folder)
    found = few(problem for name in names if (problem := trouble(folder, name, marker, by)))
    if found:
        raise NotOurs(f"{by} would write in place of what is not shown to be its own: {found}. {_ADVICE}")


def put(
    folder: Path,
    files: Mapping[str, bytes | Path],
    by: str,
    drop: Iterable[str] = (),
    withdraw: str | None = None,
    keep_others: bool = False,
    grows: bool = False,
    known: Mapping[str, FileFacts] | None = None,
) -> None:
    """Write files into a folder, and list them in its marker.

    Args:
        folder: is made if it is not there.
        files: by name relative to the folder, in the order in which they appear: the content, or a file of this file
            system that moves.
        by: the tool that writes; it replaces only what it wrote before, and what has the same content already.
        drop: names of earlier files of the tool that are removed.
        withdraw: name among ``files`` that is removed before the others change and comes back last.
        keep_others: rename a file in the way to NAME.kept and go on, in place of refusing.
        grows: whether more will be added to the files (see mocte_ds.ownership.growth).
        known: sizes and hashes of files that need not be read again, by name.

    Raises:
        NotOurs: something else lies under one of the names; nothing was changed.
        OSError: a file cannot be written.
    """
    if any(not safe_name(name) for name in files):
        raise ValueError(f"a name leaves its folder: {sorted(files)}")
    require_outside_whole(folder)
    with workshop(folder) as work, locked(folder):
        pending = _written(work / NEW, files)
        facts = {name: (known or {}).get(name) or hash_file(path) for name, path in pending.items()}
        marker = Marker.read(folder) or Marker()
        todo = [name for name in files if not _is_there(folder / name, facts[name])]
        dropped = [name for name in drop if os.path.lexists(folder / name)]
        if keep_others:
            others = [name for name in todo if trouble(folder, name, marker, by)]
            keep_aside(folder, others, "is not what was written there")
        require_ours(folder, [*todo, *dropped], by)
        if todo:
            # Before the files: until they are in place, the versions on the disk are ours too.
            marker = marker.with_files(
                {name: Entry(by, (facts[name], *_facts_there(folder / name)), grows) for name in todo}
            )
            marker.write(folder, work)
        if withdraw is not None and (len(todo) or dropped):
            with contextlib.suppress(FileNotFoundError):
                (folder / withdraw).unlink()
            todo = [*(name for name in todo if name != withdraw), withdraw]
        for name in dropped:
            (folder / name).unlink(missing_ok=True)
        for name in todo:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(pending[name], folder / name)
        if dropped:
            _remove_empty(folder, dropped)
            marker.with_files({}, without=dropped).write(folder, work)


def append(path: Path, text: str, by: str) -> None:
    """Add text to a file that the tool began, or begin it.

    Raises:
        NotOurs: it is a file of somebody else.
        OSError: it cannot be written.
    """
    if not os.path.lexists(path):
        put(path.parent, {path.name: b""}, by, grows=True)
    require_ours(path.parent, [path.name], by)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
    note_growing(path.parent, [path.name], by)


def note_growing(folder: Path, names: Iterable[str], by: str) -> None:
    """List files that grow in the marker of their folder, as they are by now.

    Raises:
        NotOurs: the marker is damaged.
        OSError: it cannot be written.
    """
    _note(folder, names, by, True)


def note_coming(folder: Path, pattern: str, by: str) -> None:
    """List files that will come and grow, by a pattern of names that nobody else gives.

    Args:
        folder: is made if it is not there.
        pattern: of the names relative to it, with `*`.
        by: the tool.

    Raises:
        NotOurs: the marker is damaged.
        OSError: it cannot be written.
    """
    with workshop(folder) as work, locked(folder):
        entry = Entry(by, (FileFacts(0, hashlib.sha256().hexdigest()),), True)
        (Marker.read(folder) or Marker()).with_files({pattern: entry}).write(folder, work)


def note_built(folder: Path, names: Iterable[str], by: str) -> None:
    """List files that a program wrote for us; raises as :func:`note_growing` does."""
    _note(folder, names, by, False)


def _note(folder: Path, names: Iterable[str], by: str, grows: bool) -> None:
    with workshop(folder) as work, locked(folder):
        marker = Marker.read(folder) or Marker()
        found = {name: Entry(by, (hash_file(folder / name),), grows) for name in names if (folder / name).is_file()}
        if any(marker.files.get(name) != entry for name, entry in found.items()):
            marker.with_files(found).write(folder, work)


def _written(folder: Path, files: Mapping[str, bytes | Path]) -> dict[str, Path]:
    """Where each file lies on the disk before it moves into place."""
    folder.mkdir()
    pending = {}
    for number, (name, content) in enumerate(files.items()):
        if isinstance(content, Path):
            pending[name] = content
            with open(content, "rb") as file:
                os.fsync(file.fileno())
        else:
            pending[name] = folder / str(number)
            write_new(pending[name], content)
    return pending


def _is_there(path: Path, facts: FileFacts) -> bool:
    """Whether a file has the wanted content already."""
    plain = path.is_file() and not path.is_symlink()
    return plain and path.stat().st_size == facts.bytes and hash_file(path) == facts


def _facts_there(path: Path) -> list[FileFacts]:
    return [hash_file(path)] if path.is_file() else []


def keep_aside(folder: Path, names: Iterable[str], why: str) -> None:
    """Give files in the way a name that is free, and say so.

    Args:
        folder: that they are in.
        names: of the files.
        why: end of the sentence that begins with a file's path.

    Raises:
        OSError: one cannot be renamed.
    """
    for name in names:
        path, number = folder / name, 1
        while os.path.lexists(kept := folder / _KEPT.format(name, f"-{number}" if number > 1 else "")):
            number += 1
        try:
            os.link(path, kept, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(path, kept, follow_symlinks=False)
        path.unlink()
        print(f"{path} {why}; it is kept as {kept.name}", file=sys.stderr, flush=True)


def _remove_empty(folder: Path, names: Iterable[str]) -> None:
    """Remove the folders of removed files that are empty by now."""
    for parent in {parent for name in names for parent in (folder / name).parents}:
        if folder in parent.parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
