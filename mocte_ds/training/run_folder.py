"""The folder of a run: where a resumed run goes on, whether it is the same run, which checkpoints stay."""

import json
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.place import resolve_tag
from mocte_ds.errors import CheckpointError, ConfigError, MocteError
from mocte_ds.ownership import put

TOOL = "pretrain"
IDENTITY_FILE = "run_identity.json"
_PACKAGES = (
    "mocte-ds deepspeed torch megatron-core transformers sentencepiece scikit-learn datasets numpy lm-eval".split()
)


def resume_folder(out: Path, resume: str) -> Path | None:
    """Folder of checkpoints to go on from, or None for a new run.

    Args:
        out: the run's folder.
        resume: `auto` (where there is a checkpoint), `no`, or a run's folder or folder of checkpoints.

    Raises:
        ConfigError: `no`, but the folder holds a run; or a folder without a checkpoint.
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
    """Name of the checkpoint behind ``step``."""
    return f"step{step}"


def checkpoint_step(tag: str) -> int | None:
    """The step in a checkpoint's name, None for a name that is not ours."""
    digits = tag.removeprefix("step")
    return int(digits) if digits != tag and digits.isdigit() else None


def require_same_run(identity: dict[str, Any], folder: Path, defaults: Mapping[str, Any] | None = None) -> None:
    """Refuse to go on from a checkpoint of another run, before anything is built.

    Args:
        identity: what must not change, flat.
        defaults: of keys that came after the version which wrote the checkpoint.
        folder: the checkpoint (one tag).

    Raises:
        CheckpointError: names every key that differs, or the file that tells is missing.
    """
    try:
        before = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / IDENTITY_FILE} cannot be read ({error}): no whole checkpoint of launch/pretrain.py. Put the "
            f"name of another checkpoint into {folder.parent / 'latest'}, or start anew in another --out."
        ) from error
    now, usual = (json.loads(json.dumps(values)) for values in (identity, dict(defaults or {})))
    before = {**{key: value for key, value in usual.items() if key in now}, **before}
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys:
        listed = "; ".join(f"{key}: checkpoint {before.get(key)!r}, run {now.get(key)!r}" for key in keys)
        raise CheckpointError(
            f"the checkpoint {folder} belongs to another configuration: {listed}. Use its values, or start anew in "
            "another --out."
        )


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, never the one that `latest` names."""
    latest = resolve_tag(folder)
    steps = {path: checkpoint_step(path.name) for path in folder.iterdir() if path.is_dir()}
    ours = sorted((path for path, step in steps.items() if step is not None), key=lambda path: -steps[path])
    for path in ours[keep:]:
        if path.name != latest:
            shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file in one move, so that readers never see half of it; one that is not the run's own is kept beside it.

    Raises:
        MocteError: it cannot be written.
    """
    try:
        put(path.parent, {path.name: json.dumps(values, indent=1).encode()}, TOOL, keep_others=True)
    except OSError as error:
        raise MocteError(
            f"cannot write {path}: {error.strerror or error}. Make room or choose another --out, and start again."
        ) from error


def versions() -> dict[str, str]:
    """Versions of what the run rests on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
