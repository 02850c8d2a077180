"""Which environment variables travel from the launcher to every rank of every host.

python -m mocte_ds.hosts.environment     prints those of .deepspeed_env, NAME=VALUE each with a zero byte after it
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError

FILE = ".deepspeed_env"
"""NAME=VALUE lines, in the working directory or in the home directory (DeepSpeed's own file)."""
PREFIXES = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "PYTORCH_", "HF_", "MOCTE_", "DS_", "DEEPSPEED_", "MALLOC_")
NAMES = (
    *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PATH"),
    *("PYTHONPATH", "PYTHONUNBUFFERED", "TRANSFORMERS_OFFLINE", "TRITON_CACHE_DIR", "GLIBC_TUNABLES"),
)


def travelling(environment: Mapping[str, str], folder: Path, interface: str | None = None) -> dict[str, str]:
    """Variables for the ranks: some of the launcher's, then those of the file, which win.

    Args:
        environment: of the launcher.
        folder: working directory.
        interface: network interface that NCCL and gloo are to use on all hosts; None: they choose.

    Raises:
        ConfigError: a line of the file is not NAME=VALUE.
    """
    found = {name: value for name, value in environment.items() if name.startswith(PREFIXES) or name in NAMES}
    if interface:
        found.update(NCCL_SOCKET_IFNAME=interface, GLOO_SOCKET_IFNAME=interface)
    return {**found, **from_file(folder)}


def from_file(folder: Path) -> dict[str, str]:
    """Variables of the files :data:`FILE` in the home directory and in a folder; the folder's win.

    Raises:
        ConfigError: a line is not NAME=VALUE.
    """
    found = {}
    for path in (Path.home() / FILE, folder / FILE):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            name, equals, value = line.partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not equals or not name.strip().isidentifier():
                raise ConfigError(f"{path}, line {number}: {line!r} is not NAME=VALUE.")
            found[name.strip()] = value.strip()
    return found


def main() -> int:
    """Print the variables of the files."""
    for name, value in from_file(Path.cwd()).items():
        sys.stdout.write(f"{name}={value}\0")
    return 0


if __name__ == "__main__":
    run_cli(main)
