"""What a run starts from: everything is looked at and checked here, before any process waits for another."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.place import resolve_tag
from mocte_ds.data import Manifest
from mocte_ds.data.stored_tokenizer import tokenizer_in
from mocte_ds.data.verify import verify_prepared
from mocte_ds.dist.collectives import require_same
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.manifest import Manifest as Saved
from mocte_ds.training.changes import Changes, as_before, read_identity, require_same_run
from mocte_ds.training.out_folder import CHECKPOINTS, require_out
from mocte_ds.training.run_config import RunConfig, identity_defaults
from mocte_ds.training.run_folder import resume_folder


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
    step: int
    """Steps that are done already."""
    changes: Changes
    """How the run differs from the checkpoint."""

    @property
    def finished(self) -> bool:
        """True if the budget is done and the checkpoint lies in the run's own folder."""
        own = self.checkpoints is not None and self.checkpoints == self.out / "checkpoints"
        return own and self.step >= self.run.training.steps

    def require_unchanged(self) -> None:
        """Refuse a folder in which another run has saved since it was looked at.

        Raises:
            CheckpointError: start again.
        """
        own = self.out / CHECKPOINTS
        if self.checkpoints in (None, own) and resolve_tag(own) != self.tag:
            raise CheckpointError(
                f"{own} has got another checkpoint while this run started: another process was at work there. "
                "Nothing was changed; start again, and the run goes on from it."
            )

    def require_agreed(self, axis: Axis) -> None:
        """Wait for all ranks, and refuse to begin where they have seen different checkpoints (collective).

        Raises:
            Disagreement: names them.
        """
        require_same((str(self.tag), self.step), "the checkpoint to go on from", axis)

    def verify_data(self) -> None:
        """Hold the files of the data against their checksums, this process's share of those of its host.

        Raises:
            DataError: a file is missing or damaged.
        """
        verify_prepared(self.prepared, self.manifest, self.run.data.verify, *_place_on_host())


def make_start(run: RunConfig, out: Path, resume: str, world_size: int, allow_data_change: bool = False) -> Start:
    """Check a run against its data, the number of ranks, its folder and the checkpoint that it goes on from.

    Nothing is written. The bytes of the data are looked at by :meth:`Start.verify_data`.

    Args:
        run: the run file.
        out: the run's folder.
        resume: see :func:`mocte_ds.training.run_folder.resume_folder`.
        world_size: ranks of the run.
        allow_data_change: go on with other data, another mix or another seed than the checkpoint's.

    Raises:
        MocteError: what does not fit, and what to do.
    """
    prepared = Path(run.data.prepared)
    manifest = Manifest.read(prepared)
    tokenizer = manifest.require_tokenizer(tokenizer_in(prepared))
    checkpoints = resume_folder(out, resume)
    tag = resolve_tag(checkpoints) if checkpoints is not None else None
    if checkpoints is not None and tag is not None:
        run = as_before(run, read_identity(checkpoints / tag), checkpoints / tag)
    settings = run.resolve(world_size, tokenizer.eod_id, tokenizer.vocab_size)
    board = settings.get("tensorboard") or {}
    if board.get("enabled") and not board.get("output_path"):
        settings["tensorboard"] = {"job_name": out.name, **board, "output_path": str(out / "tensorboard")}
    identity = {**run.identity(), "data.manifest": manifest.sha256}
    step, changes = 0, Changes()
    if checkpoints is not None and tag is not None:
        changes = require_same_run(identity, checkpoints / tag, identity_defaults(), allow_data_change)
        step = Saved.read(checkpoints / tag).step
    start = Start(run, out, prepared, manifest, settings, identity, checkpoints, tag, step, changes)
    if not start.finished:
        own = checkpoints == out / CHECKPOINTS
        other = [checkpoints] if checkpoints is not None and not own else []
        read = (run.init, getattr(run.model, "pretrained", None))
        sources = [prepared, *(Path(folder) for folder in read if folder), *other]
        require_out(out, sources, tokenizer, own, start.step if own else 0, run.training.steps)
    return start


def _place_on_host() -> tuple[int, int]:
    """Number of this process among those of its host, and how many there are: every host may have its own files."""
    # DeepSpeed's launcher and torchrun have different names for the second.
    count = os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_RANK", "0")), int(count)
