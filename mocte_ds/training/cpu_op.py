"""Builds the ops that DeepSpeed compiles at their first use on a CPU, once, with nobody waiting for a dead process."""

import contextlib
import fcntl
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import MocteError
from mocte_ds.ownership import note_built

NAME = "deepspeed_shm_comm"
"""The op that every start on a CPU loads."""
BUILDERS = {NAME: "ShareMemCommBuilder", "cpu_adam": "CPUAdamBuilder", "fused_adam": "FusedAdamBuilder"}
"""DeepSpeed's builder of each op."""
_BUILD = """import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().get_op_builder(sys.argv[1])().load(verbose=False)
"""
_LOAD_SECONDS = 20.0  # whoever loads a built op holds torch's lock for less than this
_TAIL = 2000


def build_cpu_op(folder: str | Path | None = None, name: str = NAME) -> bool:
    """Make sure that an op is built.

    torch guards a build by a plain file. A process killed while it builds leaves the file, and everyone who comes later
    waits for ever; so builds are guarded by a lock that the system frees, and whoever holds that removes such a file.

    Args:
        folder: of torch's extensions; None: $TORCH_EXTENSIONS_DIR, which is set if it is not.
        name: the op, one of BUILDERS.

    Returns:
        Whether anything had to be built.

    Raises:
        MocteError: the compiler failed; says what to install.
    """
    folder = Path(
        folder or os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "mocte_ds" / "extensions"
    )
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard = open(folder / "build.flock", "a")  # noqa: SIM115  held until the end of the function
    except OSError as error:
        raise MocteError(
            f"cannot write to {folder}: {error.strerror}; name another folder: TORCH_EXTENSIONS_DIR=FOLDER."
        ) from error
    with guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        built = (folder / name / f"{name}.so").is_file()
        _remove_stale_lock(folder / name / "lock", _LOAD_SECONDS if built else 0.0)
        if built:
            return False
        print(f"set-up: compiling DeepSpeed's op {name} (about a minute)", file=sys.stderr, flush=True)
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{environment.get('PATH', '')}"
        done = _compile(name, environment)
        if "Killed" in done.stdout + done.stderr:  # by a system short of memory: files one after another need less
            done = _compile(name, {**environment, "MAX_JOBS": "1"})
        if done.returncode:
            raise MocteError(
                f"DeepSpeed's op {name} could not be compiled:\n{done.stdout[-_TAIL:]}{done.stderr[-_TAIL:]}\nIt needs "
                "g++, ninja and Python's headers (on Debian and Ubuntu: apt-get install g++ ninja-build python3-dev)."
            )
        note_built(folder / name, [f"{name}.so", *(path.name for path in (folder / name).glob("*.o"))], "cpu_op")
    return True


def _compile(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _BUILD, BUILDERS[name]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _remove_stale_lock(lock: Path, patience: float) -> None:
    """Wait for torch's lock file until it is ``patience`` seconds old; then it belongs to a killed process."""
    with contextlib.suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < patience:
            time.sleep(0.1)
        lock.unlink()


def main() -> None:
    """Command line of launch/setup.sh and launch/test.sh: the ops named, or the one that every start loads."""
    for name in sys.argv[1:] or [NAME]:
        build_cpu_op(name=name)


if __name__ == "__main__":
    run_cli(main)
