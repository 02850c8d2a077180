"""Saving: every rank writes and hashes its files beside the old checkpoint, rank zero lists them and gives the name.

With or without waiting, it is the same thread that writes. Threads talk to each other through files only, since a
collective operation beside those of the training would tear both.
"""

import atexit
import json
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints.files import write_file
from mocte_ds.checkpoints.place import Place, last_good
from mocte_ds.checkpoints.values import size_in_bytes
from mocte_ds.dist.collectives import from_rank_zero, gather_objects, max_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.durable import show_text, sync_folder
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.ownership.manifest import Manifest

_PART = ".part_{}.json"
_PATIENCE = 1800.0  # seconds that rank zero waits for the others when it has written its own files
_TURN = 2.0  # seconds after which ranks that are done ask the others again
_DONE, _BUSY, _FAILED = 0, 1, 2


class Saver:
    """The saves of one rank; at most one is under way."""

    def __init__(self, axis: Axis) -> None:
        """Nothing is saved yet.

        Args:
            axis: the ranks that write each checkpoint together.
        """
        self._axis = axis
        self.run: str | None = None
        """Unique name of the run; a run that resumes takes over that of its checkpoint."""
        self._under_way: _Save | None = None
        atexit.register(self.tell)

    def save(
        self,
        save_dir: str | Path,
        tag: str,
        files: dict[str, Any],
        step: int,
        save_latest: bool = True,
        asynchronous: bool = False,
        ranks: int | None = None,
    ) -> None:
        """Write a checkpoint (collective).

        Args:
            save_dir: folder of all checkpoints.
            tag: name of this one; an older one of that name is replaced as a whole.
            files: what this rank writes, by name: bytes, or plain values; no name twice among the ranks. With
                ``asynchronous`` they must not change any more.
            step: optimizer steps that are done.
            save_latest: whether `latest` moves.
            asynchronous: return at once; the next save, :meth:`look` and :meth:`wait` tell what became of it.
            ranks: whose checkpoint it is; None: of the ranks that write it.

        Raises:
            CheckpointError: on all ranks: no room, or a file could not be written on one of them; no checkpoint that
                was there before was touched.
        """
        self.wait()
        place = Place(Path(save_dir), tag)
        # All ranks ask, whatever each of them knows.
        self.run = from_rank_zero(self.run if self.run is not None else uuid.uuid4().hex, self._axis)
        needed = sum(gather_objects(sum(map(size_in_bytes, files.values())), self._axis))
        rank, size = self._axis.rank, self._axis.size
        failure = None
        try:
            if rank == 0:
                place.prepare(needed)
        except (CheckpointError, OSError) as error:
            failure = error
        _agree(place, failure, self._axis)
        try:
            place.require_seen()
        except CheckpointError as error:
            failure = error
        _agree(place, failure, self._axis)
        self._under_way = _Save(place, rank, size, files, self.run, step, save_latest, size if ranks is None else ranks)
        self._under_way.start()
        if not asynchronous:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._under_way is not None and self._under_way.is_alive()

    def look(self) -> None:
        """See what became of an asynchronous save, without waiting (collective).

        Raises:
            CheckpointError: it failed on some rank.
        """
        save = self._under_way
        if save is None:
            return
        states = int(max_over_ranks(torch.tensor(save.state), self._axis))
        if states != _BUSY:
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is whole (collective).

        Raises:
            CheckpointError: it failed on some rank.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        try:
            self._wait_together(save.written.wait)
            _agree(save.place, save.failure, self._axis)
            self._wait_together(save.ended)
            _agree(save.place, save.failure, self._axis)
        except BaseException:
            save.abandoned.set()
            save.join()
            if save.rank == 0:
                save.place.give_up()
            raise

    def _wait_together(self, done: Callable[[float], bool]) -> None:
        """Wait until all ranks are done, by short exchanges: one that waits for a slow disk would run out of time.

        Args:
            done: waits at most so many seconds; whether this rank is done.
        """
        busy = True
        while busy:
            busy = bool(max_over_ranks(torch.tensor(int(not done(_TURN))), self._axis))

    def tell(self) -> None:
        """Print what became of a save that nobody waits for any more: another error, or the end of the process."""
        save = self._under_way
        if save and save.failure:
            self._under_way = None
            print(f"also: {_write_error(save.place, save.failure)}", file=sys.stderr, flush=True)


class _Save(threading.Thread):
    """One rank's part of one save; no daemon, so that a process that ends waits for it."""

    def __init__(
        self,
        place: Place,
        rank: int,
        world_size: int,
        files: dict[str, Any],
        run: str,
        step: int,
        save_latest: bool,
        ranks: int,
    ) -> None:
        super().__init__(name=f"save {place.tag}")
        self.place, self.rank, self.world_size = place, rank, world_size
        self.files, self.run_name, self.step, self.save_latest, self.ranks = files, run, step, save_latest, ranks
        self.written, self.abandoned = threading.Event(), threading.Event()
        self.failure: Exception | None = None

    @property
    def state(self) -> int:
        """Whether this rank's part is done."""
        if self.failure:
            return _FAILED
        return _BUSY if self.is_alive() else _DONE

    def ended(self, seconds: float) -> bool:
        """Wait at most so long for the end of the thread; whether it has ended."""
        self.join(seconds)
        return not self.is_alive()

    def run(self) -> None:
        """Write this rank's files; on rank zero also wait for the others' and finish."""
        try:
            own = self._write_own()
            self.written.set()
            if self.rank == 0:
                parts = self._wait_for_parts(own)
                if not self.abandoned.is_set():
                    self._commit(parts)
        except Exception as error:  # told by the main thread, on all ranks
            self.failure = error
        finally:
            self.written.set()

    def _write_own(self) -> dict[str, FileFacts]:
        facts = {}
        for name in sorted(self.files):
            facts[name] = write_file(self.place.partial / name, self.files.pop(name))
        if self.rank:
            sync_folder(self.place.partial)
            part = {name: [fact.bytes, fact.sha256] for name, fact in facts.items()}
            # The last thing that this rank does there: rank zero may rename the folder now.
            show_text(self.place.partial / _PART.format(self.rank), json.dumps(part))
        return facts

    def _wait_for_parts(self, own: dict[str, FileFacts]) -> dict[str, FileFacts]:
        """The facts about all ranks' files."""
        files, missing = dict(own), set(range(1, self.world_size))
        deadline, pause = time.monotonic() + _PATIENCE, 0.01
        while missing and not self.abandoned.is_set():
            there = {entry.name for entry in self.place.partial.iterdir()}
            for rank in sorted(rank for rank in missing if _PART.format(rank) in there):
                path = self.place.partial / _PART.format(rank)
                part = json.loads(path.read_text(encoding="utf-8"))
                if twice := sorted(files.keys() & part.keys()):
                    raise RuntimeError(f"two ranks wrote {twice[0]}")
                files.update({name: FileFacts(*facts) for name, facts in part.items()})
                path.unlink()
                missing.remove(rank)
            if missing and time.monotonic() > deadline:
                raise RuntimeError(f"rank {min(missing)} did not finish its files within {_PATIENCE:.0f} s")
            if missing:
                self.abandoned.wait(pause)
                pause = min(1.5 * pause, 0.5)
        return files

    def _commit(self, files: dict[str, FileFacts]) -> None:
        Manifest(self.run_name, self.step, self.ranks, files).write(self.place.partial)
        self.place.swap_in()
        if self.save_latest:
            self.place.move_latest()
        self.place.settle()


def _agree(place: Place, failure: Exception | None, axis: Axis) -> None:
    """Raise on all ranks what one of them met (collective)."""
    told = isinstance(failure, CheckpointError)
    text = str(failure) if told else f"{type(failure).__name__}: {failure}"
    found = gather_objects((told, text) if failure else None, axis)
    failures = [entry for entry in found if entry]
    if not failures:
        return
    if failure is not None and not isinstance(failure, CheckpointError | OSError | RuntimeError):
        raise failure  # a defect keeps its own error
    complete, text = failures[0]
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    raise (CheckpointError(text) if complete else _write_error(place, text)) from failure


def _write_error(place: Place, error: object) -> CheckpointError:
    return CheckpointError(
        f"could not save the checkpoint {place.final}: {error} ({_free(place.root)}). {last_good(place.root)}"
    )


def _free(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free / 1e6:.0f} MB are free there"
    except OSError as error:
        return f"the folder cannot be looked at: {error.strerror or error}"
