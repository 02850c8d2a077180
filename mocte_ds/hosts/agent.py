"""On one host: starts its ranks, and ends them when the launcher says so or is gone, or when one of them fails.

Started by mocte_ds.hosts.launcher over ssh. Everything that the ranks start carries the run's id in its environment;
nothing else on the host is ever signalled. Standard input carries the launcher's words, a line each: `alive`, `stop`
(somebody asked for it) or `fail` (another host failed). Its end, or silence for longer than `silence` seconds, means
that the launcher is gone.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum

import psutil

ADDRESS = "address"
"""The word that starts the line with this host's address."""
RUN_ID = "MOCTE_RUN_ID"
"""Environment variable that marks all processes of a run."""
EXIT_STOPPED, EXIT_LOST = 130, 75
_POLL = 0.2


@dataclass(frozen=True)
class Job:
    """What one host is to run."""

    command: list[str]
    """Of a rank, without `--local_rank`."""
    folder: str
    """Working directory."""
    environment: dict[str, str]
    """Variables of every rank."""
    run_id: str
    """Of the run on this host, in the environment of everything that it starts here."""
    first_rank: int
    slots: list[int]
    """Local ranks."""
    world_size: int
    grace: float
    """Seconds that ranks get to save and end after SIGTERM, before SIGKILL."""
    silence: float
    """Seconds without a word from the launcher after which it counts as gone."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


class Cause(Enum):
    """Why the ranks are ended."""

    STOP = "the launcher asked for it"
    FAIL = "another host failed"
    LOST = "the launcher is gone"
    SIGNAL = "a signal asked for it"


class Agent:
    """The ranks of one host."""

    def __init__(self, job: Job) -> None:
        """Nothing runs yet."""
        self._job = job
        self._ranks: dict[int, subprocess.Popen] = {}
        self._heard, self._input, self._signalled = time.monotonic(), b"", False

    def run(self) -> int:
        """Start the ranks and see them to their end.

        Returns:
            0: all ended well; otherwise the exit code of the first rank that failed, 130 after a stop that was asked
            for and 75 where the launcher was lost.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._start()
        while True:
            failed = self._failed()
            if failed is not None:
                rank, code = failed
                self._say(f"rank {rank} ended with {_describe(code)}; the other ranks of this host are ended")
                self._end(min(self._job.grace, 10.0))  # they wait for a rank that will not come back
                return code if code > 0 else 128 - code
            if not self._running():
                return 0
            cause = self._cause()
            if cause is not None:
                return self._stop(cause)

    def _stop(self, cause: Cause) -> int:
        self._say(f"{cause.value}: SIGTERM to {len(self._running())} ranks, SIGKILL after {self._job.grace:g} s")
        ended_well = self._end(min(self._job.grace, 10.0) if cause is Cause.FAIL else self._job.grace)
        if cause is Cause.LOST:
            return EXIT_LOST
        return EXIT_STOPPED if cause is not Cause.STOP or not ended_well else 0

    def _start(self) -> None:
        # A rank that is saving must not die of a broken pipe when the launcher is gone: the agent stays between them.
        output, errors = _forwarded(1), _forwarded(2)
        for local, slot in enumerate(self._job.slots):
            environment = {
                **os.environ,
                **self._job.environment,
                "RANK": str(self._job.first_rank + local),
                "LOCAL_RANK": str(slot),
                "LOCAL_SIZE": str(len(self._job.slots)),
                "WORLD_SIZE": str(self._job.world_size),
                RUN_ID: self._job.run_id,
            }
            process = subprocess.Popen(
                [*self._job.command, f"--local_rank={slot}"],
                cwd=self._job.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                process_group=0,  # a signal to the agent's terminal or group must not reach a rank that is saving
            )
            self._ranks[self._job.first_rank + local] = process

    def _running(self) -> list[subprocess.Popen]:
        return [process for process in self._ranks.values() if process.poll() is None]

    def _failed(self) -> tuple[int, int] | None:
        codes = {rank: process.poll() for rank, process in self._ranks.items()}
        return next(((rank, code) for rank, code in codes.items() if code), None)

    def _cause(self) -> Cause | None:
        """Wait a moment for a word of the launcher; why to stop, or None."""
        if self._signalled:
            return Cause.SIGNAL
        for word in self._words():
            self._heard = time.monotonic()
            if word == "":
                return Cause.LOST
            if word != "alive":
                return Cause.STOP if word == "stop" else Cause.FAIL
        return Cause.LOST if time.monotonic() - self._heard > self._job.silence else None

    def _words(self) -> Iterator[str]:
        """Whole lines that have arrived; an empty word at the end of the input."""
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], _POLL)
        if not ready:
            return
        data = os.read(sys.stdin.fileno(), 4096)
        if not data:
            yield ""
            return
        *lines, self._input = (self._input + data).split(b"\n")
        yield from (line.decode() for line in lines if line)

    def _end(self, grace: float) -> bool:
        """SIGTERM to the ranks, SIGKILL to all that is left of the run on this host after ``grace`` seconds.

        Returns:
            Whether all ranks that were still running ended by themselves with success.
        """
        running = self._running()
        for process in running:  # not to their children: a data worker that dies would fail a rank that is saving
            process.terminate()
        until = time.monotonic() + grace
        while self._running() and time.monotonic() < until:
            time.sleep(_POLL)
        left = len(self._running())
        if left:
            self._say(f"{left} ranks did not end within {grace:g} s; SIGKILL")
        kill_run(self._job.run_id)
        for process in self._ranks.values():
            process.wait()
        return not left and all(process.returncode == 0 for process in running)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def _say(self, text: str) -> None:
        # The launcher, and with it the reader of this line, may be gone.
        with contextlib.suppress(OSError):
            print(f"{os.uname().nodename}: {text}", file=sys.stderr, flush=True)


def kill_run(run_id: str) -> int:
    """SIGKILL to every process that carries the id of the run on this host, but for this one; how many there were."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RUN_ID) == run_id:
                process.kill()
                found += 1
    return found


def main() -> int:
    """Tell the launcher this host's address, read the job from the first line of standard input, and run it.

    With `--kill RUN_ID`: end what an agent that was killed itself has left.
    """
    # The address that ssh came to is one that other hosts can reach too.
    connection = os.environ.get("SSH_CONNECTION", "").split()
    print(f"{ADDRESS} {connection[2] if len(connection) == 4 else '127.0.0.1'}", flush=True)
    if len(sys.argv) == 3 and sys.argv[1] == "--kill":
        kill_run(sys.argv[2])
        return 0
    line = _first_line()
    if not line:
        return EXIT_LOST
    return Agent(Job(**json.loads(line))).run()


def _forwarded(target: int) -> int:
    """Write end of a pipe whose content a thread passes on to a file descriptor for as long as that takes it."""
    source, entrance = os.pipe()

    def pass_on() -> None:
        broken = False
        while data := os.read(source, 1 << 16):
            while data and not broken:
                try:
                    data = data[os.write(target, data) :]
                except OSError:
                    broken = True

    threading.Thread(target=pass_on, daemon=True).start()
    return entrance


def _first_line() -> bytes:
    """The first line of standard input, byte by byte: what follows it must stay there for select."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            return b""
        line += byte
    return line


def _describe(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
