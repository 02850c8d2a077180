"""Ends a run in which a rank stands still: says which one, where and since when, and leaves the stacks of all ranks."""

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mocte_ds.errors import NotOurs
from mocte_ds.ownership import note_coming
from mocte_ds.ownership.marker import Marker
from mocte_ds.watch.heartbeat import HEART, Heartbeat, Place

FOLDER = "heartbeat"
"""In the run's folder."""
_TOOL, _PATTERN = "pretrain", f"{FOLDER}/*"
_BYTES = 1024  # of a record: one write replaces all of it
_SIGNS = 3  # turns without a new sign of life after which a process is taken for stopped
_PAUSE = 30.0  # seconds that a turn may come late before the process is taken for paused
_LATE = 30.0  # seconds that a shared file system may take to show other hosts what one has written
_NAMED = 4  # ranks in a message
EXIT_STALLED = 1


def require_own_folder(run: Path) -> None:
    """Refuse a run's folder with something else under the name of our signs of life.

    Raises:
        NotOurs: names it.
    """
    marker = Marker.read(run) if run.is_dir() else None
    if os.path.lexists(run / FOLDER) and (marker is None or _PATTERN not in marker.files):
        raise NotOurs(
            f"pretrain would write in place of what is not shown to be its own: {run / FOLDER}. Nothing was changed. "
            "Name another --out, or move it away."
        )


def note_folder(run: Path) -> None:
    """Say in the run's folder that what will lie in ours was written by us; before any rank makes it."""
    note_coming(run, _PATTERN, _TOOL)


class Watchdog:
    """Writes this rank's sign of life, and looks whether its main thread gets on.

    A collective operation ties the ranks of a step together: where one stands, all do, so that each needs to look at
    itself alone. The first that finds itself standing reads the signs of all others and tells them apart: processes
    that give no sign of life, ranks that have not come as far as others, or all in the same place. All ranks read its
    verdict, leave their stacks and end.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        start: str,
        limit: float,
        long_limit: float,
        last_words: Callable[[str], str],
        turn: float = 2.0,
        heart: Heartbeat = HEART,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            run: folder of the run, which all ranks share.
            rank: this one.
            world_size: how many there are.
            start: name of this start of the run, the same on all ranks.
            limit: seconds that a phase may take.
            long_limit: seconds that a phase may take which is marked as long.
            last_words: told what was found, on every rank; returns what to add to it, e.g. the last good checkpoint.
            turn: seconds between two signs of life.
            heart: of this process.
        """
        self._folder, self._rank, self._world, self._start = run / FOLDER, rank, world_size, start
        self._limits, self._last_words, self._turn, self._heart = (limit, long_limit), last_words, turn, heart
        self._beats, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._number: int | None = None
        self._looked = time.monotonic()
        """Since when this process has been running without a pause."""

    def begin(self) -> None:
        """Give signs of life from now on; :func:`note_folder` comes first.

        Raises:
            OSError: they cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._number = os.open(self._folder / f"rank_{self._rank}.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._looked = time.monotonic()  # loading before it is not looked at
        self._beat()
        self._thread.start()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        number, self._number = self._number, None
        if number is not None:
            with contextlib.suppress(OSError):
                os.close(number)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._turn):
            now = time.monotonic()
            if now - last > self._turn + _PAUSE:
                self._looked = now  # the whole process was paused: nothing stands that had no time to get on
            # Whatever goes wrong here (a full disk, say), the next turn looks again.
            with contextlib.suppress(Exception):
                self._beat()
                found = self._verdict()
                if not found and self._stands(self._heart.place):
                    found = self._give_verdict()
                if found and not self._ended.is_set():
                    self._leave(found)
            last = time.monotonic()

    def _beat(self) -> None:
        self._beats += 1
        place = self._heart.place
        record = {
            **{"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "start": self._start},
            **{"beats": self._beats, "step": place.step, "count": place.count, "since": place.since},
            "phase": place.name[:300],
        }
        with contextlib.suppress(OSError):  # a full disk: the run has its own way to end
            assert self._number is not None
            os.pwrite(self._number, json.dumps(record).encode()[: _BYTES - 1].ljust(_BYTES - 1) + b"\n", 0)
            os.fsync(self._number)  # or other hosts would see it half a minute later

    def _stands(self, place: Place) -> bool:
        limit = self._limits[place.long]
        return time.monotonic() - max(place.begun, self._looked) > limit

    # ---- the verdict -----------------------------------------------------------------------------------------------

    @property
    def _verdict_file(self) -> Path:
        return self._folder / f"verdict_{self._start[:12]}.txt"

    def _verdict(self) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._verdict_file.read_text(encoding="utf-8")
        return ""

    def _give_verdict(self) -> str:
        """What all ranks will say; empty where the rank got on while the others were looked at."""
        before, place = self._records(), self._heart.place
        several = len({record["host"] for record in before.values()}) > 1
        for _ in range(max(_SIGNS, math.ceil(_LATE / self._turn)) if several else _SIGNS):
            if self._ended.wait(self._turn) or self._verdict():
                return self._verdict()
            self._beat()
        if self._heart.place != place:
            return ""
        text = tell(before, self._records(), self._world)
        with contextlib.suppress(OSError), open(self._verdict_file, "x", encoding="utf-8") as file:
            file.write(text)  # in one write; another rank may have been first
        return self._verdict() or text

    def _records(self) -> dict[int, dict[str, Any]]:
        """What the ranks of this start have written last."""
        found = {}
        for rank in range(self._world):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                record = json.loads((self._folder / f"rank_{rank}.json").read_bytes())
                if record["start"] == self._start:
                    found[rank] = record
        return found

    def _leave(self, text: str) -> NoReturn:
        with contextlib.suppress(OSError), open(self._folder / f"stacks_{self._rank}.txt", "w") as file:
            place = self._heart.place
            print(
                f"rank {self._rank} on {socket.gethostname()}, step {place.step}: {place.name}", file=file, flush=True
            )
            faulthandler.dump_traceback(file, all_threads=True)
        with contextlib.suppress(Exception):
            _flight_record(self._folder / f"flight_{self._rank}.json")
        whole = f"{text} Stacks of every rank that still answers: {self._folder}/stacks_*.txt."
        with contextlib.suppress(Exception):
            whole = f"{whole} {self._last_words(whole)}"
        try:
            # The launcher ends all ranks when the first has ended: the others must have left their stacks by then.
            several = len({record["host"] for record in self._records().values()}) > 1
            until = time.monotonic() + 2 * self._turn + 1.0 + (_LATE if several else 0.0)
            while time.monotonic() < until and (not several or len(self._alive()) < self._world):
                time.sleep(self._turn / 4)
            if self._rank == min(self._alive(), default=self._rank):
                os.write(sys.stderr.fileno(), f"\nerror: {whole}\n".encode())
            else:
                time.sleep(self._turn)
        finally:
            os._exit(EXIT_STALLED)

    def _alive(self) -> list[int]:
        """Ranks that have left their stacks since the verdict."""
        if not self._verdict_file.exists():
            return []
        since = self._verdict_file.stat().st_mtime - 1.0
        stacks = ((rank, self._folder / f"stacks_{rank}.txt") for rank in range(self._world))
        return [rank for rank, path in stacks if path.exists() and path.stat().st_mtime >= since]


def tell(before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]], world_size: int) -> str:
    """Which ranks hold the others up, in one line.

    Args:
        before: last record of each rank.
        now: the same some turns later.
        world_size: ranks of the run.
    """
    silent = [r for r in range(world_size) if r not in now or now[r]["beats"] == before.get(r, {}).get("beats")]
    order = {rank: (record["step"], record["count"]) for rank, record in now.items()}
    first = now[max(order, key=lambda rank: order[rank])] if now else {}
    # Ranks that freeze different experts reduce their gradients in different numbers of exchanges.
    behind = [r for r in now if order[r] < max(order.values()) and _at(now[r]) != _at(first)]
    if silent:
        why, chosen = "gives no sign of life: its process is stopped, or its host is gone", silent
    elif behind:
        why, chosen = "the others have come further and wait", behind
    elif world_size > 1:
        why = "all ranks stand there: the exchange between them hangs, look at the network, or at a device that hangs"
        chosen = list(now)
    else:
        why, chosen = "it gets no further", list(now)
    told = [_where(rank, now.get(rank), bool(silent)) for rank in chosen[:_NAMED]]
    more = f" and {len(chosen) - _NAMED} more ranks" if len(chosen) > _NAMED else ""
    return f"the run stands still: {'; '.join(told)}{more} ({why})."


def _at(record: dict[str, Any]) -> tuple[int, str]:
    return record["step"], record["phase"]


def _where(rank: int, record: dict[str, Any] | None, silent: bool) -> str:
    if record is None:
        return f"rank {rank} has never given a sign of life"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["since"]))
    stands = "was last seen" if silent else "stands"
    return (
        f"rank {rank} (process {record['pid']}) on {record['host']} {stands} in step {record['step']}, "
        f"{record['phase']}, since {since}"
    )


def _flight_record(path: Path) -> None:
    """torch's record of the last collective operations, where it keeps one (NCCL, TORCH_FR_BUFFER_SIZE above 0)."""
    import torch

    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    content = dump() if dump is not None else None
    if content:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
