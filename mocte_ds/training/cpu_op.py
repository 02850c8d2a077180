"""Builds the ops that DeepSpeed compiles at their first use on a CPU, once, with nobody waiting for a dead process."""

import fcntl
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import MocteError
from mocte_ds.ownership import note_built

NAME = "deepspeed_shm_comm"
"""The op that every start on a CPU loads."""
BUILDERS = {NAME: "ShareMemCommBuilder", "cpu_adam": "CPUAdamBuilder", "fused_adam": "FusedAdamBuilder"}
"""DeepSpeed's builder of each op."""
STAMP = "mocte_built_for.txt"
"""Beside an op: the environment that it was built for."""
_BUILD = """import sys
from mocte_ds.training.cpu_op import use_kernel_lock
use_kernel_lock()
from deepspeed.accelerator import get_accelerator
get_accelerator().get_op_builder(sys.argv[1])().load(verbose=False)
"""
_TAIL = 2000


class KernelBaton:
    """In place of torch's FileBaton, a file that stays when its holder is killed: a lock that the system frees.

    Whoever comes second waits, and then builds what is not built: ninja does nothing where the first one was done.
    """

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        """Not held.

        Args:
            lock_file_path: torch's, below the folder of the op.
        """
        self._path = f"{lock_file_path}.flock"
        self._file: int | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock; True."""
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let go of it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def use_kernel_lock() -> None:
    """Let torch guard its builds in this process by :class:`KernelBaton`."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = KernelBaton


def build_cpu_op(folder: str | Path | None = None, name: str = NAME) -> bool:
    """Make sure that an op is built for this environment, and that no process of ours waits for a killed one.

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
    use_kernel_lock()
    try:
        (folder / name).mkdir(parents=True, exist_ok=True)
        guard = open(folder / "build.flock", "a")  # noqa: SIM115  held until the end of the function
    except OSError as error:
        raise MocteError(
            f"cannot write to {folder}: {error.strerror}; name another folder: TORCH_EXTENSIONS_DIR=FOLDER."
        ) from error
    with guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        stamp, wanted = folder / name / STAMP, _environment()
        there = (folder / name / f"{name}.so").is_file()
        if there and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return False
        print(f"set-up: compiling DeepSpeed's op {name} (about a minute)", file=sys.stderr, flush=True)
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{environment.get('PATH', '')}"
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{environment.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        done = _compile(name, environment)
        if "Killed" in done.stdout + done.stderr:  # by a system short of memory: files one after another need less
            done = _compile(name, {**environment, "MAX_JOBS": "1"})
        if done.returncode:
            raise MocteError(
                f"DeepSpeed's op {name} could not be compiled:\n{done.stdout[-_TAIL:]}{done.stderr[-_TAIL:]}\nIt needs "
                "g++, ninja and Python's headers (on Debian and Ubuntu: apt-get install g++ ninja-build python3-dev)."
            )
        stamp.write_text(wanted, encoding="utf-8")
        built = [f"{name}.so", STAMP, *(path.name for path in (folder / name).glob("*.o"))]
        note_built(folder / name, built, "cpu_op")
    return True


def _environment() -> str:
    """What a build depends on: in another environment, ninja compiles anew at the first load."""
    versions = [f"{package} {metadata.version(package)}" for package in ("torch", "deepspeed")]
    return "\n".join([*versions, f"python {sys.version}", f"in {sys.prefix}"])


def _compile(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _BUILD, BUILDERS[name]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main() -> None:
    """Command line of launch/setup.sh and launch/test.sh: the ops named, or the one that every start loads."""
    for name in sys.argv[1:] or [NAME]:
        build_cpu_op(name=name)


if __name__ == "__main__":
    run_cli(main)
