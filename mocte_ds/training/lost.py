"""When another rank ends in the middle: one line with the first cause instead of what gloo or NCCL say of it."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from mocte_ds.errors import ConfigError, MocteError, peer_is_lost
from mocte_ds.json_files import read_object
from mocte_ds.ownership import note_built, require_ours
from mocte_ds.ownership.run_lock import CAUSE_FILE
from mocte_ds.shown import one_line
from mocte_ds.stop import EXIT_AGAIN

_TOOL = "pretrain"
_PATIENCE = 2.0  # seconds that a rank which fails has for writing down why
_TURN = 15.0  # seconds: the end of a process takes some on a slow machine
_BEGUN = time.time()
_APART = 10.0  # seconds between the starts of a run's ranks, by the clocks of their hosts


class LostRank(MocteError):
    """Another rank has ended; the message holds what is known of the reason."""

    exit_code = 1


@contextlib.contextmanager
def word_of_errors(folder: Path, rank: int) -> Iterator[None]:
    """Leave word of an error for the other ranks; in place of an echo of another rank's end, raise what it said.

    Args:
        folder: of the run, which the run may write into (:func:`mocte_ds.training.out_folder.require_out`).
        rank: this one.

    Raises:
        LostRank: another rank has ended.
    """
    try:
        yield
    except SystemExit as error:
        if error.code == EXIT_AGAIN:
            write_cause(folder, rank, LostRank("a signal stopped it before the first step. Start again."))
        raise
    except Exception as error:
        if peer_is_lost(error):
            raise lost_rank(folder) from error
        if isinstance(error, MocteError):
            give_way(rank, error)
        write_cause(folder, rank, error)
        raise


def give_way(rank: int, error: MocteError) -> None:
    """Let rank 0 say an error that all ranks have: the launcher ends the others as soon as it has.

    Before word is left, so that rank 0 finds nothing of others in a folder that it takes away again.

    Raises:
        SystemExit: with the error's own code, where the launcher has come: SLURM takes the largest of all ranks.
    """
    if not rank:
        return
    try:
        time.sleep(_TURN)
    except SystemExit:
        raise SystemExit(error.exit_code) from None


def write_cause(folder: Path, rank: int, error: BaseException) -> None:
    """Leave word of why this rank ends, for the others; the first one's stays, that of an earlier start does not.

    Args:
        folder: of the run, which all ranks share; where it is not there, or cannot be written, nothing happens.
        rank: this one.
        error: the reason.
    """
    text = one_line(error, None)
    text = text if isinstance(error, MocteError) else f"{type(error).__name__}: {text}"
    path = folder / CAUSE_FILE
    try:
        if path.exists() and not _is_of_this_start(path):
            forget_cause(folder)
        require_ours(folder, [CAUSE_FILE], _TOOL)
        with open(path, "x", encoding="utf-8") as file:
            kind = type(error).__name__
            json.dump({"rank": rank, "error": text, "kind": kind, "code": getattr(error, "exit_code", 1)}, file)
        note_built(folder, [CAUSE_FILE], _TOOL)
    except (OSError, MocteError):  # a full disk, or a damaged marker: this rank has its own error to tell
        return


def forget_cause(folder: Path) -> None:
    """Remove what an earlier start has left; a file of somebody else under this name stays.

    No rank of this start may have failed by then: call it where all ranks have met.
    """
    with contextlib.suppress(OSError, MocteError):
        require_ours(folder, [CAUSE_FILE], _TOOL)
        (folder / CAUSE_FILE).unlink(missing_ok=True)


def _is_of_this_start(path: Path) -> bool:
    return path.stat().st_mtime > _BEGUN - _APART


def lost_rank(folder: Path) -> LostRank:
    """What to say in the place of an echo.

    Args:
        folder: of the run.
    """
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            values = read_object(folder / CAUSE_FILE)
            if not _is_of_this_start(folder / CAUSE_FILE):
                break
            return LostRank(f"another rank ended; the first cause, on rank {values['rank']}: {values['error']}")
        except (ConfigError, LookupError):
            time.sleep(0.05)
    return LostRank(
        "another rank ended without leaving word of why: it was killed (by the system, short of memory?), or its "
        "message stands above. Start again: the run resumes from its last good checkpoint."
    )
