"""What a run starts from: everything is looked at and checked here, before any process waits for another."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.place import resolve_tag
from mocte_ds.data import Manifest
from mocte_ds.data.stored_tokenizer import tokenizer_in
from mocte_ds.data.verify import verify_prepared
from mocte_ds.training.run_config import RunConfig, identity_defaults
from mocte_ds.training.run_folder import checkpoint_step, require_same_run, resume_folder


@dataclass(frozen=True)
class Start:
    """A checked run, on any rank."""

    run: RunConfig
    out: Path
    """The run's folder."""
    prepared: Path
    """Folder of the data."""
    manifest: Manifest
    """Of the data."""
    settings: dict[str, Any]
    """The complete DeepSpeed config, with or without its "mocte" block."""
    identity: dict[str, Any]
    """What a checkpoint must agree with."""
    checkpoints: Path | None
    """Folder of checkpoints to go on from; None: a new run."""
    tag: str | None
    """The checkpoint in it."""

    @property
    def step(self) -> int:
        """Steps that are done already."""
        return (checkpoint_step(self.tag) or 0) if self.tag else 0

    @property
    def finished(self) -> bool:
        """True if the budget is done and the checkpoint lies in the run's own folder."""
        own = self.checkpoints is not None and self.checkpoints == self.out / "checkpoints"
        return own and self.step >= self.run.training.steps


def make_start(run: RunConfig, out: Path, resume: str, world_size: int) -> Start:
    """Check a run against its data, the number of ranks and the checkpoint that it goes on from.

    Args:
        run: the run file.
        out: the run's folder.
        resume: see :func:`mocte_ds.training.run_folder.resume_folder`.
        world_size: data-parallel ranks.

    Raises:
        MocteError: what does not fit, and what to do.
    """
    prepared = Path(run.data.prepared)
    manifest = Manifest.read(prepared)
    tokenizer = manifest.require_tokenizer(tokenizer_in(prepared))
    settings = run.resolve(world_size, tokenizer.eod_id, tokenizer.vocab_size)
    board = settings.get("tensorboard") or {}
    if board.get("enabled") and not board.get("output_path"):
        settings["tensorboard"] = {"job_name": out.name, **board, "output_path": str(out / "tensorboard")}
    identity = {**run.identity(), "data.manifest": manifest.sha256}
    checkpoints = resume_folder(out, resume)
    tag = resolve_tag(checkpoints) if checkpoints else None
    if checkpoints and tag:
        require_same_run(identity, checkpoints / tag, identity_defaults())
    verify_prepared(prepared, manifest, run.data.verify, *_place_on_host())
    return Start(run, out, prepared, manifest, settings, identity, checkpoints, tag)


def _place_on_host() -> tuple[int, int]:
    """Number of this process among those of its host, and how many there are: every host may have its own files."""
    # DeepSpeed's launcher and torchrun have different names for the second.
    count = os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_RANK", "0")), int(count)
