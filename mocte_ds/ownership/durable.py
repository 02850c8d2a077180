"""Small files and names that outlast a power cut."""

import contextlib
import os
import secrets
from pathlib import Path


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not be there yet, onto the disk.

    Raises:
        OSError: there is one, or it cannot be written.
    """
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def pending_name(path: Path) -> Path:
    """Where a file is written before it gets its name: a name beside it that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.mocte-tmp")


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one move, onto the disk: readers see the old content or the new one, never half."""
    show_text(path, text)
    sync_folder(path.parent)


def show_text(path: Path, text: str) -> None:
    """Write a small file in one move; a power cut may take it, and its folder may be renamed as soon as it is seen."""
    pending = pending_name(path)
    try:
        write_new(pending, text.encode())
        os.replace(pending, path)
    except OSError:
        with contextlib.suppress(OSError):
            pending.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
