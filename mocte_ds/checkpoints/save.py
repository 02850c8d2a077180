"""Saving: DeepSpeed's files, then ours, then `latest`, so that a broken save never hides the last good checkpoint."""

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocte_ds.dist.collectives import gather_objects, world
from mocte_ds.errors import CheckpointError

FORMAT = 1
STATE_FILE = "mocte_state.pt"
RANDOM_FILE = "mocte_random_rank{rank}.pt"
# torch.save reports a full disk as a RuntimeError of its zip writer.
_WRITE_ERRORS = (OSError, RuntimeError)


@contextlib.contextmanager
def prepare_checkpoint(save_dir: str | Path, tag: str) -> Iterator[None]:
    """Turn a failing write into an error that says what is still intact.

    Args:
        save_dir: folder of all checkpoints.
        tag: this checkpoint's folder in it.

    Raises:
        CheckpointError: a file could not be written.
    """
    try:
        yield
    except _WRITE_ERRORS as error:
        raise _write_error(save_dir, tag, error) from error


def finish_checkpoint(
    save_dir: str | Path,
    tag: str,
    mocte: dict[str, Any],
    client_state: dict[str, Any],
    save_latest: bool,
    rank_state: dict[str, Any] | None = None,
) -> None:
    """Write our state and every rank's random state, make sure that all ranks did, and move `latest` (collective).

    Args:
        save_dir: folder of all checkpoints.
        tag: this checkpoint's folder in it; DeepSpeed's files are there already.
        mocte: state of the controller.
        client_state: the caller's own state; entries that cannot be read back without executing code are left to
            DeepSpeed's files, which hold all of them.
        save_latest: whether `latest` moves.
        rank_state: what only this rank's controller has; left out where it cannot be read back without executing code.

    Raises:
        CheckpointError: a file could not be written on some rank; `latest` has not moved.
    """
    folder = Path(save_dir) / tag
    rank, _ = world()
    failure: Exception | None = None
    try:
        if rank == 0:
            plain = {key: value for key, value in client_state.items() if is_plain(value)}
            torch.save({"format": FORMAT, "mocte": mocte, "client_state": plain}, folder / STATE_FILE)
        own = {"mocte": rank_state} if rank_state and is_plain(rank_state) else {}
        torch.save({**random_states(), **own}, folder / RANDOM_FILE.format(rank=rank))
    except _WRITE_ERRORS as error:
        failure = error
    failures = [text for text in gather_objects(str(failure) if failure else None) if text]
    if failures:
        raise _write_error(save_dir, tag, failures[0]) from failure
    if rank == 0 and save_latest:
        try:
            pending = Path(save_dir) / "latest.tmp"
            pending.write_text(tag, encoding="utf-8")
            os.replace(pending, Path(save_dir) / "latest")
        except OSError as error:
            failure = error
    failures = [text for text in gather_objects(str(failure) if failure else None) if text]
    if failures:
        raise _write_error(save_dir, tag, failures[0]) from failure


def random_states() -> dict[str, Any]:
    """States of this rank's random number generators, in plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    numbers = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    states = {
        "python": [version, list(internal), gauss],
        "numpy": [name, numbers, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def is_plain(value: Any) -> bool:
    """Whether a value is made of tensors, numbers, texts, lists, tuples and dicts alone.

    Exact types: subclasses, such as an enum or a numpy number, are stored as code to execute.
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value.keys())) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str, bytes, torch.Tensor)


def _write_error(save_dir: str | Path, tag: str, error: object) -> CheckpointError:
    latest = Path(save_dir) / "latest"
    last = latest.read_text(encoding="utf-8").strip() if latest.is_file() else "none"
    with contextlib.suppress(OSError):
        error = f"{error} ({shutil.disk_usage(save_dir).free / 1e6:.0f} MB are free there)"
    what = f"could not save the checkpoint {Path(save_dir) / tag}: {error}."
    if last == tag:
        return CheckpointError(
            f"{what} It was saved over the checkpoint that {latest} names, which may be damaged now; make room, then "
            "save again or write the name of another checkpoint into that file."
        )
    return CheckpointError(
        f"{what} The last good checkpoint ({last}) is untouched; make room or choose another folder, and start again: "
        "the run resumes from it."
    )
