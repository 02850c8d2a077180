"""The folder of a run: where a resumed run goes on, and which checkpoints stay."""

import contextlib
import os
import re
from pathlib import Path

from mocte_ds.checkpoints.place import PARTIAL, is_unsettled, resolve_tag
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership import hash_file
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from mocte_ds.ownership.marker import MARKER
from mocte_ds.ownership.proof import few
from mocte_ds.ownership.workshop import begin, discard

TOOL = "pretrain"
_TAG = re.compile(r"step(0|[1-9][0-9]{0,17})")


def resume_folder(out: Path, resume: str) -> Path | None:
    """Folder of checkpoints to go on from, or None for a new run.

    Args:
        out: the run's folder.
        resume: `auto` (where there is a checkpoint), `no`, or a run's folder or folder of checkpoints.

    Raises:
        ConfigError: `no`, but the folder holds a run; or a folder without a checkpoint.
        CheckpointError: `latest` was lost or is damaged.
    """
    own = out / "checkpoints"
    if resume == "auto":
        return own if resolve_tag(own) else None
    if resume == "no":
        if resolve_tag(own):
            raise ConfigError(f"{out} already holds a run; take another --out, remove the folder, or resume it.")
        return None
    for candidate in (Path(resume) / "checkpoints", Path(resume)):
        if resolve_tag(candidate):
            return candidate
    raise ConfigError(f"--resume {resume}: no checkpoint there (no file 'latest').")


def checkpoint_tag(step: int) -> str:
    """Name of the checkpoint after ``step``."""
    return f"step{step}"


def checkpoint_step(tag: str) -> int | None:
    """The step in a checkpoint's name, None for a name that is not ours."""
    found = _TAG.fullmatch(tag)
    return int(found[1]) if found else None


def prune_checkpoints(folder: Path, keep: int, step: int | None = None) -> list[str]:
    """Remove all but the newest ``keep`` checkpoints, never the one that `latest` names.

    A folder is a checkpoint of ours if its manifest is whole and lists everything that is in it, byte for byte.
    Nothing else is removed. Checkpoints of later steps than the run has come to are of a branch that was left when
    `latest` was set back: they stay and do not count.

    Args:
        folder: of all checkpoints.
        keep: how many stay.
        step: that the run has come to; None: that of the newest checkpoint.

    Returns:
        Why a folder stays that has the name of an old checkpoint or of a later one, a sentence each.
    """
    latest = resolve_tag(folder)
    named = {path: found for path in folder.iterdir() if (found := checkpoint_step(path.name)) is not None}
    later = {path for path in named if step is not None and named[path] > step}
    foreign = {path: reason for path in named if (reason := _not_ours(path))}
    ours = sorted((path for path in named if path not in foreign and path not in later), key=lambda path: -named[path])
    for path in ours[keep:]:
        if path.name == latest:
            continue
        if changed := _changed(path):
            foreign[path] = changed
            continue
        # In one move, so that what is left of it when the process is killed has the name of a leftover.
        aside = path.with_name(PARTIAL.format(path.name))
        os.rename(path, aside)
        with contextlib.suppress(OSError):  # a full disk
            begin(aside)
        discard(aside)
    oldest = min((named[path] for path in ours[:keep]), default=0)
    told = [f"{path} stays: {foreign[path]}" for path in sorted(foreign) if named[path] < oldest]
    return told + [
        f"{path} stays: it is of a later step than this run has come to; remove it if you do not need it"
        for path in sorted(later - foreign.keys())
    ]


def _not_ours(path: Path) -> str | None:
    """Why a folder is not shown to be a checkpoint and nothing else, by names; None where it is."""
    if path.is_symlink() or not path.is_dir():
        return "it is not a folder"
    try:
        known = {*Manifest.read(path).files, MANIFEST_FILE, *([MARKER] if is_unsettled(path) else [])}
    except CheckpointError:
        return f"it has no whole {MANIFEST_FILE}"
    other = sorted(e.name for e in path.iterdir() if e.name not in known or e.is_symlink() or not e.is_file())
    return f"{other[0]} in it is not of the checkpoint" if other else None


def _changed(path: Path) -> str:
    """Which files of a checkpoint are not what was saved; empty: none.

    Checkpoints are large: only files that were touched after the manifest, which a save writes last, are read.
    """
    saved = (path / MANIFEST_FILE).stat().st_ctime_ns
    files = Manifest.read(path).files
    touched = [name for name in files if (path / name).stat().st_ctime_ns > saved]
    return few(
        f"{name} in it was changed since it was saved" for name in touched if hash_file(path / name) != files[name]
    )
