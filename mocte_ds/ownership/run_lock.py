"""One run at a time in a run's folder: a lock of the system, and a sign of life for other hosts."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocte_ds.errors import MocteError
from mocte_ds.ownership.marker import MARKER
from mocte_ds.ownership.put import note_coming, require_ours

LOCK_FILE = "run.lock"
CAUSE_FILE = "last_error.json"
"""Why the last start in the folder failed (mocte_ds/training/lost.py)."""
_TOOL = "pretrain"
_BEAT = 10.0  # seconds between two signs of life
_SILENT = 60.0  # seconds without one after which a process on another host is taken for dead
_MOST_BYTES = 1000
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class RunLock:
    """The lock of a run's folder while it is held."""

    def __init__(self, folder: Path, number: int) -> None:
        """Keep the folder and the open lock file."""
        self._folder, self._number = folder, number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def begin(self) -> None:
        """Say who holds it, and give signs of life from now on."""
        facts = {"host": socket.gethostname(), "boot": boot(), "pid": os.getpid(), "since": time.time()}
        os.ftruncate(self._number, 0)
        os.pwrite(self._number, json.dumps(facts).encode(), 0)
        os.fsync(self._number)
        self._thread.start()

    def require_held(self) -> None:
        """Refuse to go on in a folder that is another one by now, or gone.

        Raises:
            MocteError: the folder was moved or removed, or another process took over.
        """
        if not _is_at(self._number, self._folder / LOCK_FILE):
            raise MocteError(
                f"{self._folder} is not the folder any more that the run began in: it was moved, removed or replaced "
                f"({LOCK_FILE} in it is gone or another one). The run stops and writes nothing more there. Put it "
                "back, or name another folder, and start again."
            )

    def end(self, keep: bool) -> None:
        """Let go.

        Args:
            keep: whether the folder stays if a start that failed wrote nothing else into it.
        """
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if _is_at(self._number, self._folder / LOCK_FILE):
                os.ftruncate(self._number, 0)
                if not keep:
                    _remove_bare(self._folder)
        os.close(self._number)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with contextlib.suppress(OSError):  # require_held tells it
                os.utime(self._number)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[RunLock]:
    """Hold the folder of a run, for rank 0 alone; what a killed process left is taken over.

    Args:
        folder: that the run may write into; is made if it is not there, and goes again if nothing came into it.

    Raises:
        MocteError: another process runs there; names host, process and since when.
        NotOurs: a file of somebody else has the lock's name.
        OSError: it cannot be written.
    """
    keep = folder.exists()
    lock = RunLock(folder, _taken(folder))
    try:
        lock.begin()
        yield lock
    finally:
        lock.end(keep)


def require_idle(folder: Path) -> None:
    """Refuse a folder, before it is removed, in which a run of this host is going on, or in a folder in it.

    Raises:
        MocteError: names the process.
    """
    for path in sorted(folder.rglob(LOCK_FILE)):
        # What cannot be opened is not the lock of a run, and not every file system has locks.
        with contextlib.suppress(OSError), open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _name(_holder(file.fileno()))
                raise MocteError(
                    f"a run is going on in {path.parent}: {holder}. Nothing was removed; stop it first."
                ) from None


def _taken(folder: Path) -> int:
    """The open lock file, locked."""
    path = folder / LOCK_FILE
    require_ours(folder, [LOCK_FILE], _TOOL)
    note_coming(folder, LOCK_FILE, _TOOL)
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(number, folder)
            _require_silent(number, folder)
            if _is_at(number, path):
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # whoever held it has removed it


def _lock(number: int, folder: Path) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(_holder(number), folder) from None
    except OSError:  # a file system without locks: signs of life have to do
        return


def _require_silent(number: int, folder: Path) -> None:
    """Refuse a folder whose holder lives on another host, where the lock may not reach; wait until that is known."""
    holder = _holder(number)
    if not holder or not _may_live(holder):
        if holder:
            _tell_takeover(holder, folder)
        return
    # By its changes alone: the clocks of two hosts differ.
    last, until = os.fstat(number).st_mtime_ns, time.monotonic() + _SILENT
    logging.getLogger("mocte_ds").warning(
        f"{folder / LOCK_FILE} was left by {_name(holder)}: waiting {_SILENT:.0f} s for a sign of life from there."
    )
    while time.monotonic() < until:
        time.sleep(min(1.0, _SILENT / 10))
        with contextlib.suppress(OSError):
            os.close(os.open(folder / LOCK_FILE, os.O_RDONLY))  # makes a network file system look again
        if os.fstat(number).st_mtime_ns != last:
            raise _refusal(_holder(number), folder)
    _tell_takeover(holder, folder)


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether a holder may run although the lock was free."""
    if holder.get("boot") != boot():
        return True
    if holder.get("pid") == os.getpid():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, LookupError, TypeError, ValueError, OverflowError):
        return True
    return True


def _tell_takeover(holder: dict[str, Any], folder: Path) -> None:
    logging.getLogger("mocte_ds").warning(f"{folder}: the lock of {_name(holder)}, which is gone, is taken over.")


def _refusal(holder: dict[str, Any], folder: Path) -> MocteError:
    return MocteError(
        f"another process runs in {folder}: {_name(holder)}. Two runs in one folder would overwrite each other's logs "
        "and checkpoints: wait for its end, stop it, or name another folder. Nothing was changed."
    )


def _name(holder: dict[str, Any]) -> str:
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder["since"])))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]} since {since}"
    except (LookupError, TypeError, ValueError, OverflowError, OSError):
        return "a process that has not said its name"


def _holder(number: int) -> dict[str, Any]:
    """What the lock file says; nothing where nobody holds it, or cannot be read."""
    try:
        values = json.loads(os.pread(number, _MOST_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def boot() -> str:
    """What tells hosts of one name apart."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _is_at(number: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path, follow_symlinks=False))
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise


def _remove_bare(folder: Path) -> None:
    """Remove a folder in which nothing is but the lock and why the start failed."""
    ours = {LOCK_FILE, CAUSE_FILE, MARKER}
    if {path.name for path in folder.iterdir()} <= ours:
        for name in (CAUSE_FILE, LOCK_FILE, MARKER):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
