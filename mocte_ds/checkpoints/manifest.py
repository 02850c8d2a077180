"""Holds a checkpoint against its list of files; one that does not agree with it is refused by name."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mocte_ds.dist.collectives import from_rank_zero, gather_objects
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.facts import FileFacts, hash_file
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest

_SHOWN = 5  # problems in one message
_THREADS = min(4, os.cpu_count() or 1)  # that hash where no other rank does


def require_whole(folder: Path, names: Iterable[str] | None = None) -> Manifest:
    """Refuse a checkpoint whose files are not the ones that were saved (on this process alone).

    Args:
        folder: of one checkpoint; only read.
        names: files that will be read; None: all of the folder.

    Raises:
        CheckpointError: names every file that is missing, torn, changed, mixed up or too much.
    """
    manifest = Manifest.read(folder)
    extra = _extra(folder, manifest) if names is None else []
    chosen = list(manifest.files) if names is None else list(names)
    _raise_for(folder, extra + _problems(folder, manifest, chosen, True, _THREADS))
    return manifest


def require_whole_on_ranks(folder: Path, axis: Axis, content: bool = True) -> Manifest:
    """:func:`require_whole` for all files, each of which one rank looks at; all ranks raise the same (collective).

    Args:
        folder: of one checkpoint, in a file system that all ranks share.
        axis: the ranks that look.
        content: False: names and sizes only.
    """
    problems, extra, manifest = [], [], None
    try:
        manifest = Manifest.read(folder)
        problems = _problems(folder, manifest, sorted(manifest.files)[axis.rank :: axis.size], content)
        if axis.rank == 0:
            extra = _extra(folder, manifest)
        failure = None
    except CheckpointError as error:
        failure = str(error)
    found = gather_objects((failure, problems), axis)
    failures = [text for text, _ in found if text]
    if failures or manifest is None:
        raise CheckpointError(failures[0])
    # In the order of the files, however many ranks have looked at them.
    _raise_for(folder, from_rank_zero(extra, axis) + sorted(problem for _, part in found for problem in part))
    return manifest


def problems_by_file(folder: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with each file, nothing where it is the one that was saved; files too many are there too."""
    found = {name: "; ".join(_problems(folder, manifest, [name], True)) for name in sorted(manifest.files)}
    return {**found, **dict(zip(_strangers(folder, manifest), _extra(folder, manifest), strict=True))}


def _raise_for(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise CheckpointError(
        f"the checkpoint {folder} is damaged: {'; '.join(problems[:_SHOWN])}{more}. Nothing of it was loaded; write "
        f"the name of another checkpoint into {folder.parent / 'latest'}."
    )


def _problems(folder: Path, manifest: Manifest, names: Iterable[str], content: bool, threads: int = 1) -> list[str]:
    """What is wrong with some files, a text each, in their order; hashing is most of the time, and threads share it."""
    with ThreadPoolExecutor(threads, "sha256") as pool:
        return [text for text in pool.map(lambda name: _problem(folder, manifest, name, content), names) if text]


def _problem(folder: Path, manifest: Manifest, name: str, content: bool) -> str | None:
    """What is wrong with a file; None: nothing."""
    path, wanted = folder / name, manifest.files.get(name)
    if wanted is None:
        return f"{name} is not in its {MANIFEST_FILE}"
    try:
        size = path.stat().st_size
        if size == wanted.bytes and (not content or hash_file(path) == wanted):
            return None
        return _difference(folder, manifest, name, size)
    except FileNotFoundError:
        return f"{name} is missing{_renamed(folder, manifest, wanted)}"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def _difference(folder: Path, manifest: Manifest, name: str, size: int) -> str:
    """In which way a file is not the one that was saved."""
    wanted, found = manifest.files[name], hash_file(folder / name)
    for other, facts in manifest.files.items():
        if facts == found:
            return f"{name} holds the content of {other}: files were mixed up"
    for path in sorted(folder.parent.glob(f"*/{MANIFEST_FILE}")):
        try:
            neighbour = Manifest.read(path.parent)
        except CheckpointError:
            continue
        for other, facts in neighbour.files.items():
            if facts == found:
                return f"{name} holds the content of {other} of the checkpoint {path.parent.name}: files were mixed up"
    if size < wanted.bytes:
        return f"{name} is truncated to {size} of {wanted.bytes} bytes"
    if size > wanted.bytes:
        return f"{name} has {size} bytes, {wanted.bytes} were saved"
    return f"{name} was changed: its sha256 is not that of what was saved (damaged, or of another run)"


def _renamed(folder: Path, manifest: Manifest, wanted: FileFacts) -> str:
    """Where the content of a missing file went, if it is still in the folder."""
    for name in _strangers(folder, manifest):
        path = folder / name
        if path.is_file() and path.stat().st_size == wanted.bytes and hash_file(path) == wanted:
            return f" ({name} holds its content: it was renamed)"
    return ""


def _extra(folder: Path, manifest: Manifest) -> list[str]:
    return [f"{name} does not belong to it" for name in _strangers(folder, manifest)]


def _strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Names that the manifest lacks; hidden ones are left alone (file systems put some there)."""
    known = {*manifest.files, MANIFEST_FILE}
    return sorted(path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))
