"""Saves a run's checkpoints and goes on from them, for engines with blocks and for DeepSpeed's own."""

import os
from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints.load import restore_random_states
from mocte_ds.checkpoints.save import RANDOM_FILE, prepare_checkpoint, random_states
from mocte_ds.dist.collectives import gather_objects, world
from mocte_ds.errors import CheckpointError, MocteError
from mocte_ds.training.run_folder import IDENTITY_FILE, write_json


def save(engine: Any, folder: Path, tag: str, client_state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Write a checkpoint; `latest` moves when every rank has written everything (collective).

    Args:
        engine: of mocte_ds.initialize or deepspeed.initialize.
        folder: of all checkpoints.
        tag: this checkpoint.
        client_state: plain values that :func:`load` gives back.
        identity: what a run that goes on from here must agree with.

    Raises:
        CheckpointError: a file could not be written; the last good checkpoint stays `latest`.
    """
    rank = world()[0]
    with prepare_checkpoint(folder, tag):
        if rank == 0:
            (folder / tag).mkdir(parents=True, exist_ok=True)
            write_json(folder / tag / IDENTITY_FILE, identity)
        if hasattr(engine, "mocte"):
            engine.save_checkpoint(str(folder), tag, client_state=client_state)
            return
        # DeepSpeed's rank 0 would move `latest` before the other ranks have written their parts.
        engine.save_checkpoint(str(folder), tag, client_state=client_state, save_latest=False)
        torch.save(random_states(), folder / tag / RANDOM_FILE.format(rank=rank))
        gather_objects(None)
        if rank == 0:
            (folder / "latest.tmp").write_text(tag, encoding="utf-8")
            os.replace(folder / "latest.tmp", folder / "latest")
        gather_objects(None)


def load(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Bring the engine and this rank's random states to where a checkpoint was written (collective).

    Returns:
        The client state.

    Raises:
        CheckpointError: missing or damaged files.
    """
    try:
        path, client_state = engine.load_checkpoint(str(folder), tag)
    except MocteError:
        raise
    except Exception as error:  # DeepSpeed, pickle and zip raise many types for a damaged file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint {folder / tag} cannot be loaded: {text}. Put the name of another checkpoint into "
            f"{folder / 'latest'}, or start anew in another --out."
        ) from error
    if path is None:
        raise CheckpointError(f"the checkpoint {folder / tag} is incomplete: DeepSpeed found no model states there.")
    if not hasattr(engine, "mocte"):
        restore_random_states(folder, tag)
    return client_state
