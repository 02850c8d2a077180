"""Builds the ops that DeepSpeed compiles at their first use on a CPU, once, with nobody waiting for a dead process."""

import contextlib
import fcntl
import glob
import os
import subprocess
import sys
import sysconfig
import time
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
from mocte_ds.dist.cpu_op import use_kernel_lock
use_kernel_lock()
from deepspeed.accelerator import get_accelerator
get_accelerator().get_op_builder(sys.argv[1])().load(verbose=False)
"""
_TAIL = 2000
_PAUSE = 0.2
_YOUNG = 900.0
"""Seconds; no op takes longer to build."""


class KernelBaton:
    """In place of torch's FileBaton, a file that stays when its holder is killed: a lock that the system frees.

    Whoever comes second waits, and then builds what is not built: ninja does nothing where the first one was done.
    Torch's file is taken too, for plain DeepSpeed processes that build in the same folder: they wait for us, and we for
    them as long as one of this machine's processes has the file open. One that nobody has open was left by a killed
    process, and is removed.
    """

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        """Not held.

        Args:
            lock_file_path: torch's, below the folder of the op.
        """
        self._theirs, self._path = Path(lock_file_path), f"{lock_file_path}.flock"
        self._files: list[int] = []

    def try_acquire(self) -> bool:
        """Wait for the lock; True."""
        self._files = [os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)]
        fcntl.flock(self._files[0], fcntl.LOCK_EX)
        told = False
        while True:
            try:
                self._files.append(os.open(self._theirs, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC))
                return True
            except FileExistsError:
                if not _is_open(self._theirs):
                    self._theirs.unlink(missing_ok=True)
                    continue
            if not told:
                told = True
                print(
                    f"waiting for another process that compiles in {self._theirs.parent}", file=sys.stderr, flush=True
                )
            time.sleep(_PAUSE)

    def release(self) -> None:
        """Let go of it."""
        if self._files:
            self._theirs.unlink(missing_ok=True)
            for file in reversed(self._files):
                os.close(file)
            self._files = []


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has a file open; where the system does not tell of all, whether it is young."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return False
    if not Path("/proc/self/fd").is_dir():
        return time.time() - wanted.st_mtime < _YOUNG
    hidden = False
    for process in glob.iglob("/proc/[0-9]*/fd"):
        try:
            places = [os.path.join(process, name) for name in os.listdir(process)]
        except PermissionError:  # another user's, who may compile there too
            hidden = True
            continue
        except OSError:  # it has ended
            continue
        for place in places:
            with contextlib.suppress(OSError):  # closed
                found = os.stat(place)
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    return hidden and time.time() - wanted.st_mtime < _YOUNG


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
