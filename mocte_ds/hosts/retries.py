"""Whether a run that failed starts again, and after which pause: for the launcher over ssh, and for SLURM.

python -m mocte_ds.hosts.retries --state FILE --status CODE --since SECONDS -- --run RUN.yaml ...
"""

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mocte_ds.cli import count_or_zero, run_cli
from mocte_ds.errors import ConfigError
from mocte_ds.json_files import read_object
from mocte_ds.ownership.run_lock import CAUSE_FILE

USER_ERROR = 2
"""Exit code of an error that the user has to mend, see mocte_ds.cli: no restart helps."""
_PAUSE, _LONGEST_PAUSE = 15.0, 600.0
_TAIL = 1 << 16  # bytes of events.jsonl that hold its last line


@dataclass
class Retries:
    """Counts failures in a row: a new checkpoint since the last one begins the count again."""

    limit: int
    count: int = 0
    checkpoint: str | None = None

    def after(self, code: int, checkpoint: str | None) -> float | None:
        """Seconds to wait before the next start; None: no further start.

        Args:
            code: exit code of the run.
            checkpoint: its last good checkpoint.
        """
        if checkpoint != self.checkpoint:
            self.count, self.checkpoint = 0, checkpoint
        if code in (0, USER_ERROR) or self.count >= self.limit:
            return None
        self.count += 1
        return min(_LONGEST_PAUSE, _PAUSE * 2 ** (self.count - 1))


def run_folder(command: Sequence[str]) -> Path:
    """The folder of the run that a command line of launch/pretrain.py makes."""
    values = {}
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--out", "--run", "--run-file"):
            values[name.removesuffix("-file")] = value if equals else following
    return Path(values.get("--out") or Path("runs") / Path(values.get("--run", "run")).stem)


def last_checkpoint(folder: Path) -> str | None:
    """Path of the last good checkpoint of a run; None: there is none."""
    latest = folder / "checkpoints" / "latest"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return str(latest.parent / latest.read_text(encoding="utf-8").strip())
    return None


def was_stopped(folder: Path) -> bool:
    """Whether a signal has stopped the run, which has saved: the last of its events says so."""
    with contextlib.suppress(OSError, ValueError, LookupError), open(folder / "events.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        return json.loads(file.read().splitlines()[-1])["event"] == "stop"
    return False


def is_of_the_user(folder: Path, since: float) -> bool:
    """Whether the first error of a start is one that the user has to mend, whatever code the launcher ends with.

    Args:
        folder: of the run.
        since: time of the start.
    """
    path = folder / CAUSE_FILE
    with contextlib.suppress(OSError, ConfigError):
        return path.stat().st_mtime >= since and read_object(path).get("code") == USER_ERROR
    return False


def _read(path: Path, limit: int) -> Retries:
    with contextlib.suppress(OSError, ConfigError, TypeError):
        return Retries(**{**read_object(path), "limit": limit})
    return Retries(limit)


def main(argv: list[str] | None = None) -> int:
    """Print the seconds to wait before the next start, or nothing; see --help."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--state", type=Path, required=True, help="file that remembers failures between two calls")
    parser.add_argument("--status", type=int, required=True, help="exit code of the run")
    parser.add_argument("--since", type=float, required=True, help="when it started, in seconds since 1970")
    parser.add_argument("--restarts", type=count_or_zero, default=5, help="failures in a row (default: 5)")
    parser.add_argument("command", nargs="+", help="-- options of launch/pretrain.py")
    args = parser.parse_args(argv)
    folder, retries = run_folder(args.command), _read(args.state, args.restarts)
    if args.status == 0:
        pause = 0.0 if was_stopped(folder) else None
    else:
        code = USER_ERROR if is_of_the_user(folder, args.since) else args.status
        pause = retries.after(code, last_checkpoint(folder))
        args.state.parent.mkdir(parents=True, exist_ok=True)
        args.state.write_text(json.dumps(asdict(retries)), encoding="utf-8")
    if pause is not None:
        print(f"{pause:.0f}")
    return 0


if __name__ == "__main__":
    run_cli(main)
