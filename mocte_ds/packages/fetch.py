"""The file of a package, from its registry's own client or from a folder; a pinned one is held against its sha256."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mocte_ds.errors import DataError
from mocte_ds.ownership import hash_file


@dataclass(frozen=True)
class Package:
    """One package of a registry."""

    registry: str
    """`pypi`, `npm` or `debian`."""
    name: str
    version: str = ""
    """Empty: the one that the system's package lists offer; Debian keeps no earlier ones."""
    sha256: str = ""
    """Of its file; empty where no version is named."""
    licence: str = ""
    """Of the package."""

    @property
    def title(self) -> str:
        """As its registry writes it."""
        return f"{self.name}{_SIGNS[self.registry]}{self.version}" if self.version else self.name

    @property
    def command(self) -> list[str]:
        """What downloads it into the current folder; nothing is installed."""
        return [*_COMMANDS[self.registry], self.title]

    @property
    def pattern(self) -> str:
        """Of the names that its file can have."""
        if self.registry == "pypi":
            return f"{self.name.replace('-', '_')}-{self.version}-*.whl"
        if self.registry == "npm":
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_*.deb"


_SIGNS = {"pypi": "==", "npm": "@", "debian": "="}
_COMMANDS = {
    "pypi": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"],
    "npm": ["npm", "pack", "--silent", "--ignore-scripts"],
    "debian": ["apt-get", "download", "--quiet", "--quiet"],
}
_ADVICE = {
    "pypi": "pip reaches no index that has it",
    "npm": "npm is missing or reaches no registry",
    "debian": "this is not Debian 12, its package lists are old (apt-get update), or there is no network",
}


def file_of(package: Package, into: Path, source: Path | None = None) -> Path:
    """The file of a package, downloaded or found.

    Args:
        package: which.
        into: folder for what is downloaded; a file that is there already is taken.
        source: folder with files that were downloaded before; None: the registry's client downloads.

    Raises:
        DataError: it cannot be had, or another file lies there; says what to do.
    """
    found = _in_folder(package, source or into)
    if found is None and source is not None:
        raise DataError(
            f"{source} has no file {package.pattern}; download it where there is a network ({_shown(package)}) and put "
            "it there."
        )
    if found is None:
        _download(package, into)
        found = _in_folder(package, into)
    if found is None:
        raise DataError(f"{_shown(package)} left no file {package.pattern}.")
    require_pinned(package, found)
    return found


def require_pinned(package: Package, path: Path) -> None:
    """Refuse a file that is not the one which the package's checksum names.

    Raises:
        DataError: it is missing or another one.
    """
    try:
        found = hash_file(path).sha256
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if package.sha256 and found != package.sha256:
        raise DataError(
            f"{path} is not the file of {package.name} {package.version}: its sha256 is {found}, that one's "
            f"{package.sha256}. Nothing was taken from it; download it again."
        )


def _in_folder(package: Package, folder: Path) -> Path | None:
    found = sorted(folder.glob(package.pattern))
    if len(found) > 1:
        raise DataError(f"{folder} has several files of {package.name}: {', '.join(p.name for p in found)}; keep one.")
    return found[0] if found else None


def _download(package: Package, into: Path) -> None:
    try:
        done = subprocess.run(package.command, cwd=into, capture_output=True, text=True, check=False)
        told, failed = done.stderr.strip().splitlines() or done.stdout.strip().splitlines(), done.returncode != 0
    except OSError as error:
        told, failed = [f"{package.command[0]}: {error.strerror or error}"], True
    if failed:
        said = told[-1][:300] if told else "it said nothing"
        raise DataError(
            f"{package.title} could not be downloaded: {_ADVICE[package.registry]} ({said}). Download it elsewhere "
            f"({_shown(package)}) and name the file or its folder."
        )


def _shown(package: Package) -> str:
    command = ["pip", *package.command[3:]] if package.registry == "pypi" else package.command
    return " ".join(part for part in command if part not in ("--quiet", "--silent"))
