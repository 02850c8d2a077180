"""What Trainer.save_model writes: an export, into a folder that may hold checkpoints and logs too."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME

from mocte_ds.dist.collectives import from_rank_zero
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.marker import MARKER

STAGING = "export-in-progress"
"""Folder within the target that holds the export until it is whole and compared."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def export_into(engine: Any, folder: Path) -> None:
    """Write an export beside what a folder holds already; files of its names are replaced (collective).

    An export of its own folder replaces that folder as a whole, and refuses one that holds anything else. Trainer's
    output folder does: checkpoints, logs, a tokenizer. So the files move there one by one when the export has been
    compared, weights last, after those of an earlier model are gone: at no time do they mix.

    Args:
        engine: of mocte_ds.initialize.
        folder: on the machine of rank zero.

    Raises:
        CheckpointError, ConfigError: on all ranks; the training can go on.
    """
    engine.mocte.export(folder / STAGING)
    failure = None
    if engine.mesh.world.rank == 0:
        try:
            _move(folder / STAGING, folder)
        except OSError as error:  # the other ranks must not wait for ever
            failure = (
                f"could not write {error.filename or folder}: {error.strerror}; make room, or name another folder."
            )
    failure = from_rank_zero(failure, engine.mesh.world)
    if failure is not None:
        raise CheckpointError(failure)


def write_companions(trainer: Any, folder: Path) -> None:
    """Write what Trainer writes beside the weights: its tokenizer or processor, and its arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def _move(staging: Path, folder: Path) -> None:
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name):
            path.unlink()
    # The marker would say that everything in the folder is the export's, and may be replaced with it.
    (staging / MARKER).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: _WEIGHTS.fullmatch(path.name) is not None):
        os.replace(path, folder / path.name)
    shutil.rmtree(staging)
