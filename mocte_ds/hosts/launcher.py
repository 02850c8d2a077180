"""Starts a run on all hosts of a hostfile over ssh; stops it on all of them on Ctrl-C, SIGTERM, or when one fails.

python -m mocte_ds.hosts.launcher --hostfile FILE [options] -- launch/pretrain.py --run RUN.yaml ...
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from mocte_ds.cli import count_or_zero, run_cli, seconds
from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.hosts.agent import ADDRESS, EXIT_STOPPED, Job
from mocte_ds.hosts.environment import travelling
from mocte_ds.hosts.retries import Retries, last_checkpoint, run_folder

HEARTBEAT = 5.0
"""Seconds between two words to each host."""
MOST_SLOTS = 64
_POLL = 0.2


class Host:
    """One host and the connection to its agent."""

    def __init__(self, name: str, slots: Sequence[int], ssh: Sequence[str], silence: float) -> None:
        """Connect.

        Args:
            name: as ssh knows it; `localhost` and this host's own name need no ssh.
            slots: its local ranks.
            ssh: options of ssh.
            silence: seconds without an answer after which the connection counts as cut.
        """
        self.name, self.slots, self.told = name, list(slots), False
        self.ended_at = 0.0
        self._ssh, self._silence = list(ssh), silence
        self._address: str | None = None
        self._known = threading.Event()
        self.process = self._open("-m", "mocte_ds.hosts.agent")
        for source, target in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def address(self, until: float) -> str:
        """Address that other hosts reach it by.

        Raises:
            MocteError: it did not answer in time, or ssh failed.
        """
        while not self._known.wait(_POLL):
            if self.process.poll() is not None or time.monotonic() > until:
                code = self.process.poll()
                why = f"ssh ended with exit code {code}" if code is not None else "no answer in time"
                raise MocteError(
                    f"host {self.name} cannot be started ({why}). Try by hand: ssh {self.name} true. It needs a key "
                    "without a password, and this folder with its .venv at the same path."
                )
        assert self._address is not None
        return self._address

    def tell(self, word: str) -> None:
        """Send a line to the agent; a connection that is gone shows by its end."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()

    def code(self) -> int | None:
        """Exit code; None while it runs."""
        code = self.process.poll()
        if code is not None and not self.ended_at:
            self.ended_at = time.monotonic()
        return code

    def kill(self, run_id: str) -> None:
        """End the connection, and what a killed agent may have left on the host, where that can be reached."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        with (
            contextlib.suppress(OSError, subprocess.TimeoutExpired),
            self._open("-m", "mocte_ds.hosts.agent", "--kill", run_id) as last,
        ):
            try:
                last.communicate(timeout=20)
            finally:
                last.kill()

    def _open(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, *words]
        if self.name not in ("localhost", "127.0.0.1", socket.gethostname()):
            alive = max(1, round(self._silence / 3))
            options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", f"ServerAliveInterval={alive}"]
            options += ["-o", "ServerAliveCountMax=3", *self._ssh]
            there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"
            command = ["ssh", *options, self.name, there]
        pipe = subprocess.PIPE
        # A Ctrl-C at the terminal is for the launcher alone; it tells the agents.
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)

    def _pass_on(self, source: IO[bytes] | None, target: IO[str]) -> None:
        assert source is not None
        for line in source:
            text = line.decode(errors="replace")
            if not self._known.is_set() and text.startswith(ADDRESS):
                self._address = text.split()[1]
                self._known.set()
                continue
            with contextlib.suppress(OSError, ValueError):
                target.write(f"{self.name}: {text}")
                target.flush()


class Launcher:
    """One run on all hosts."""

    def __init__(self, args: argparse.Namespace, hosts: Mapping[str, Sequence[int]]) -> None:
        """Nothing is started yet.

        Args:
            args: of the command line.
            hosts: local ranks of each host.
        """
        self._args, self._slots = args, hosts
        self.stopping = False
        """Whether somebody asked for the end."""

    def run(self) -> int:
        """Start all hosts, and see them to their end.

        Returns:
            0: all ended well; 130: stopped on demand; else the exit code of the host that failed first.
        """
        run_id, hosts = uuid.uuid4().hex, list[Host]()
        try:
            hosts += [Host(name, slots, self._args.ssh, self._args.silence) for name, slots in self._slots.items()]
            self._begin(hosts, run_id)
            code = self._watch(hosts)
        finally:
            for number, host in enumerate(hosts):
                if host.code() != 0:
                    host.kill(_on_host(run_id, number))
        return code

    def _begin(self, hosts: list[Host], run_id: str) -> None:
        args, until = self._args, time.monotonic() + self._args.start_timeout
        addresses = [host.address(until) for host in hosts]
        environment = travelling(os.environ, Path.cwd(), args.interface)
        environment.update(MASTER_ADDR=args.master_addr or addresses[0], MASTER_PORT=str(args.master_port))
        environment["CROSS_SIZE"] = str(len(hosts))
        world_size, first = sum(len(host.slots) for host in hosts), 0
        for number, host in enumerate(hosts):
            command = [sys.executable, "-u", *args.command]
            own = {**environment, "CROSS_RANK": str(number)}
            name = _on_host(run_id, number)
            job = Job(command, os.getcwd(), own, name, first, host.slots, world_size, args.grace, args.silence)
            host.tell(job.to_json())
            first += len(host.slots)

    def _watch(self, hosts: list[Host]) -> int:
        """Until all hosts have ended; the first that failed decides."""
        spoken, failed, deadline = 0.0, None, float("inf")
        while any(host.code() is None for host in hosts) and time.monotonic() < deadline:
            now = time.monotonic()
            if now - spoken > HEARTBEAT:
                spoken = now
                for host in hosts:
                    host.tell("alive")
            if failed is None:
                failed = next((host for host in hosts if host.code()), None)
            word = "stop" if self.stopping else "fail" if failed else None
            if word:
                for host in (host for host in hosts if not host.told):
                    host.told = True
                    host.tell(word)
                    deadline = now + self._args.grace + 15.0
            time.sleep(_POLL)
        if self.stopping:
            return EXIT_STOPPED
        failed = failed or next((host for host in hosts if host.code()), None)
        if failed is None:
            return 0
        code = failed.code()
        assert code
        good = last_checkpoint(run_folder(self._args.command))
        told = f" The last good checkpoint is {good}." if good else ""
        print(f"error: host {failed.name} {_how(code)}.{told}", file=sys.stderr, flush=True)
        return code if code > 0 else 1


def read_hosts(path: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, list[int]]:
    """Local ranks of each host of a hostfile, in DeepSpeed's format: lines `HOST slots=NUMBER`.

    Args:
        path: the hostfile.
        include: only these hosts; empty: all.
        exclude: not these hosts.

    Raises:
        ConfigError: the file is missing or not a hostfile, or hosts are named that are not in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; copy launch/hostfile.example and write your hosts into it.") from error
    hosts: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdecimal() or not 0 < int(slots) <= MOST_SLOTS or words[0].startswith("-") or words[0] in hosts:
            raise ConfigError(f"{path}, line {number}: {line!r} is not HOST slots=NUMBER, each host once.")
        hosts[words[0]] = list(range(int(slots)))
    unknown = sorted({*include, *exclude} - set(hosts))
    if unknown:
        raise ConfigError(f"{path} has no host {', '.join(unknown)}; it has {', '.join(hosts) or 'none'}.")
    chosen = {name: slots for name, slots in hosts.items() if name not in exclude and (not include or name in include)}
    if not chosen:
        raise ConfigError(f"{path} leaves no host to run on; a line is HOST slots=NUMBER.")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hostfile", type=Path, required=True, help="hosts and their numbers of GPUs")
    parser.add_argument("--include", nargs="+", default=[], metavar="HOST", help="use only these hosts")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="HOST", help="leave these hosts out")
    parser.add_argument("--master_addr", default=None, help="address of the first host (default: where ssh finds it)")
    parser.add_argument("--master_port", type=int, default=29500, help="a free port of the first host")
    parser.add_argument("--interface", default=None, help="network interface of NCCL and gloo on all hosts")
    parser.add_argument("--ssh", type=shlex.split, default=[], metavar="OPTIONS", help='e.g. "-p 2222 -i KEY"')
    parser.add_argument(
        "--grace", type=seconds, default=300.0, help="seconds to save and end after a stop (default: 300)"
    )
    parser.add_argument(
        "--silence", type=seconds, default=60.0, help="seconds until a silent host is lost (default 60)"
    )
    parser.add_argument("--start_timeout", type=seconds, default=120.0, help="seconds until all hosts must answer")
    parser.add_argument(
        "--restarts",
        type=count_or_zero,
        default=0,
        help="restarts after failures that are not the user's, without a new checkpoint between them (default: 0)",
    )
    parser.add_argument("command", nargs="+", help="-- SCRIPT OPTIONS")
    args = parser.parse_args(argv)
    launcher = Launcher(args, read_hosts(args.hostfile, args.include, args.exclude))

    def stop(_number: int, _frame: object) -> None:
        if not launcher.stopping:
            print(f"stopping: the ranks save and end (at most {args.grace:g} s)", file=sys.stderr, flush=True)
        launcher.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    retries = Retries(args.restarts, checkpoint=last_checkpoint(run_folder(args.command)))
    while True:
        code = _run(launcher, again=retries.count > 0)
        pause = retries.after(code, last_checkpoint(run_folder(args.command)))
        if launcher.stopping or pause is None:
            break
        print(
            f"start again in {pause:g} s ({retries.count} of {args.restarts} without a new checkpoint)",
            file=sys.stderr,
            flush=True,
        )
        _sleep(pause, launcher)
    return EXIT_STOPPED if launcher.stopping else code


def _run(launcher: Launcher, again: bool) -> int:
    """One start; a host that does not come back at once, where the run was on it before, is a failure like others."""
    try:
        return launcher.run()
    except MocteError as error:
        if not again:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _sleep(seconds: float, launcher: Launcher) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not launcher.stopping:
        time.sleep(_POLL)


def _on_host(run_id: str, number: int) -> str:
    """What the processes of a host carry: two "hosts" may be one machine, and one must not end the other's ranks."""
    return f"{run_id}-{number}"


def _how(code: int) -> str:
    if code == 255:
        return "was lost (its ssh connection ended)"
    return f"failed with exit code {code}" if code > 0 else f"failed by signal {-code}"


if __name__ == "__main__":
    run_cli(main)
