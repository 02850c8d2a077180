"""Paths that a user names: whether something is there, and whether it can be written, asked before any work starts."""

import os
from pathlib import Path

from mocte_ds.errors import MocteError
from mocte_ds.shown import path_shown

_LONGEST = 255
"""Bytes of a name."""


def is_file(path: Path) -> bool:
    """Whether the file is there; False too for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_file_name(name: str) -> bool:
    """Whether a file can have the name: no path, and no longer than Linux allows."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= _LONGEST and name not in (".", "..") and not {"/", "\0"} & {*name}


def require_folder_for(path: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made.

    Args:
        path: an existing folder, or one that is to be made.
        option: what names it, for the message, e.g. "--out".

    Raises:
        MocteError: it is a file, lies below one, is read-only, or has a name that no folder can have.
    """
    there = _nearest_there(path, option)
    if not there.is_dir():
        raise MocteError(f"{option} {path}: {there} is a file, and a folder is needed; name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise MocteError(f"{option} {path}: {there} cannot be written to; name another folder or change its rights.")


def require_file_for(path: Path, option: str) -> None:
    """Refuse a file that cannot be written; nothing is made. Arguments and errors as :func:`require_folder_for`."""
    there = _nearest_there(path, option)
    if there != path:
        require_folder_for(path.parent, option)
    elif path.is_dir():
        raise MocteError(f"{option} {path} is a folder, and a file is needed; name a file in it.")
    elif not os.access(path, os.W_OK):
        raise MocteError(f"{option} {path} cannot be written to; name another file or change its rights.")


def _nearest_there(path: Path, option: str) -> Path:
    """The path, or the nearest of the folders above it that is there."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise MocteError(f"{option} {path}: {place} is a link to nowhere; name another path.") from None
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MocteError(f"{option} {path_shown(path)}: {reason}; name another path.") from error
        return place
    return Path(".")
