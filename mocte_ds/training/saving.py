"""Saves a run's checkpoints and goes on from them, for engines with blocks and for DeepSpeed's own."""

import json
import logging
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.load import skipped_steps
from mocte_ds.checkpoints.manifest import require_whole_on_ranks
from mocte_ds.checkpoints.random_states import restore_random_states
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import CheckpointError, MocteError, peer_is_lost
from mocte_ds.shown import one_line
from mocte_ds.skips import Skips
from mocte_ds.training.changes import IDENTITY_FILE
from mocte_ds.training.run_folder import prune_checkpoints
from mocte_ds.zero.checkpoint_files import own_files, use_checkpoint_files


def prepare(engine: Any, identity: dict[str, Any]) -> None:
    """Make a new engine ready for :func:`save` and :func:`load`.

    Args:
        engine: of mocte_ds.initialize or deepspeed.initialize.
        identity: what a run that goes on from its checkpoints must agree with.
    """
    if not hasattr(engine, "mesh"):
        engine.mesh = mesh_of_processes()
    if not hasattr(engine, "skips"):
        engine.skips = Skips(0, engine.mesh.world, lambda _facts: None)
    files = engine.checkpoint_engine if hasattr(engine, "mocte") else use_checkpoint_files(engine, engine.mesh)
    files.always[IDENTITY_FILE] = json.dumps(identity, indent=1).encode()


def save(engine: Any, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all (collective).

    Args:
        engine: from :func:`prepare`.
        folder: of all checkpoints.
        tag: this checkpoint.
        client_state: plain values that :func:`load` gives back.

    Raises:
        CheckpointError: a file could not be written; the last good checkpoint stays `latest`.
    """
    if hasattr(engine, "mocte"):
        engine.save_checkpoint(str(folder), tag, client_state=client_state)
        return
    client_state = {**client_state, "skipped": engine.skips.streak}
    engine.checkpoint_engine.save_checkpoint(
        lambda state: engine.save_checkpoint(str(folder), tag, client_state=state, save_latest=False),
        folder,
        tag,
        engine.global_steps,
        client_state,
        lambda: own_files(engine.mesh.world),
    )


def finish(engine: Any) -> None:
    """Wait until the last checkpoint is whole (collective).

    Raises:
        CheckpointError: it could not be written; the last good checkpoint stays `latest`.
    """
    engine.checkpoint_engine.saver.wait()


class Pruning:
    """Removes a run's old checkpoints, and says once of each why it stays."""

    def __init__(self, folder: Path, keep: int, rank: int) -> None:
        """Nothing is removed yet.

        Args:
            folder: of all checkpoints.
            keep: number of newest ones that stay.
            rank: on ranks other than 0 every call does nothing.
        """
        self._folder, self._keep, self._rank, self._told = folder, keep, rank, set[str]()

    def __call__(self, step: int) -> None:
        """Remove what is old after a step."""
        for text in prune_checkpoints(self._folder, self._keep, step) if self._rank == 0 else ():
            if text not in self._told:
                self._told.add(text)
                logging.getLogger("mocte_ds").warning(text)


def load(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Bring the engine and this rank's random states to where a checkpoint was written (collective).

    A checkpoint of another layout is brought to the run's on the way; `engine.checkpoint_engine.note` says so.

    Returns:
        The client state.

    Raises:
        CheckpointError: missing, changed or damaged files.
    """
    try:
        if hasattr(engine, "mocte"):
            path, client_state = engine.load_checkpoint(str(folder), tag)
        else:
            manifest = require_whole_on_ranks(folder / tag, engine.mesh.world)
            with engine.checkpoint_engine.reading(folder / tag, manifest) as read:
                path, client_state = engine.load_checkpoint(str(folder), tag)
                restore_random_states(folder, tag, engine.mesh.world.rank, read)
            engine.skips.restore(skipped_steps((client_state or {}).pop("skipped", []), folder / tag))
    except MocteError:
        raise
    except Exception as error:
        if peer_is_lost(error):
            raise
        # DeepSpeed raises many types for a file that is not what it expects
        raise CheckpointError(
            f"the checkpoint {folder / tag} cannot be loaded: {one_line(error)}. Put the name of another checkpoint "
            f"into {folder / 'latest'}, or start again in another --out."
        ) from error
    if path is None:
        raise CheckpointError(f"the checkpoint {folder / tag} is incomplete: DeepSpeed found no model states there.")
    return client_state
