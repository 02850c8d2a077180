"""Where the files that ship lie, in a checkout and in an installed package: scripts, tools, run files by name."""

from pathlib import Path

from mocte_ds.errors import ConfigError
from mocte_ds.paths import is_file
from mocte_ds.shown import nearest, path_shown

_PACKAGE = Path(__file__).resolve().parent
INSTALLED = (_PACKAGE / "launch").is_dir()
"""Whether this is an installed package, into which setup.py has copied launch/, tools/ and ds_configs/."""
ROOT = _PACKAGE if INSTALLED else _PACKAGE.parent
LAUNCH, TOOLS = ROOT / "launch", ROOT / "tools"


def shipped_names(kind: str) -> list[str]:
    """Names of the files that ship.

    Args:
        kind: `runs` or `studies`.
    """
    return sorted(path.stem for path in (LAUNCH / kind).glob("*.yaml"))


def shipped_file(kind: str, path: str | Path) -> Path:
    """The file that a user names: by its path, or by the bare name of one that ships, as in `--run gpt-140m`.

    Args:
        kind: `runs` or `studies`.
        path: a path is returned as it is, whether a file is there or not; a file of the user goes before a shipped one.

    Raises:
        ConfigError: a bare name of no file; names the nearest.
    """
    path = Path(path)
    if is_file(path) or path.suffix or len(path.parts) != 1:
        return path
    names = shipped_names(kind)
    if path.name in names:
        return LAUNCH / kind / f"{path.name}.yaml"
    raise ConfigError(
        f"there is no file {path_shown(path)}, and none of that name ships with mocte-ds."
        f"{nearest(path.name, names)} Those that do: {', '.join(names)}."
    )
