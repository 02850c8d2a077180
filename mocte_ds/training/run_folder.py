"""The folder of a run: where a resumed run goes on, whether it is the same run, which checkpoints stay."""

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.load import resolve_tag
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.training.run_config import RunConfig

_PACKAGES = ("mocte-ds", "deepspeed", "torch", "megatron-core", "transformers", "sentencepiece", "scikit-learn", "datasets")


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


def require_same_run(run: RunConfig, manifest_sha256: str, saved: dict[str, Any], where: Path) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        CheckpointError: names every key that differs.
    """
    now = {**run.identity(), "data.manifest": manifest_sha256}
    before = saved.get("identity") or {}
    differing = [f"{key}: checkpoint {before.get(key)!r}, run {value!r}" for key, value in now.items() if before.get(key) != value]
    if differing:
        raise CheckpointError(
            f"the checkpoint in {where} belongs to another configuration: {'; '.join(differing)}. Use its run file, or "
            "start anew in another --out."
        )


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, never the one that `latest` names."""
    latest = resolve_tag(folder)
    tags = [path for path in folder.iterdir() if path.is_dir() and path.name.startswith("step")]
    tags.sort(key=lambda path: int(path.name.removeprefix("step")), reverse=True)
    for path in tags[keep:]:
        if path.name != latest:
            shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file in one move, so that readers never see half of it."""
    pending = path.with_suffix(".tmp")
    pending.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(pending, path)


def versions() -> dict[str, str]:
    """Versions of what the run rests on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
