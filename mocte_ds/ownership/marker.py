"""The marker: a hidden file that lists what we wrote into a folder, with sizes, hashes and a checksum of its own."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mocte_ds.errors import NotOurs
from mocte_ds.json_files import parse_json, read_text
from mocte_ds.ownership.durable import write_new
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.paths import is_file_name

MARKER = ".mocte-ds.json"
_FORMAT = 1
_NOTE = "what mocte-ds wrote here; it removes and replaces nothing else"


@dataclass(frozen=True)
class Entry:
    """One file that we wrote."""

    by: str
    """The tool."""
    versions: tuple[FileFacts, ...]
    """Newest first. The marker is written before the file, so that after a kill in between an older one is there."""
    grows: bool = False
    """Whether lines or records are added to it; the version is that of its first bytes."""


@dataclass(frozen=True)
class Marker:
    """What we wrote into one folder."""

    files: dict[str, Entry] = field(default_factory=dict)
    """By name relative to the folder, with `/`."""
    whole: bool = False
    """Whether the folder is the whole output of one tool, which takes no other files."""
    work: str | None = None
    """Own name of a folder that holds nothing but unfinished work of ours, and what the work is for."""
    target: str | None = None
    """With `work`: name beside it that the work is to get."""

    def text(self) -> str:
        """The file's content."""
        values: dict[str, Any] = {"format": _FORMAT, "note": _NOTE}
        if self.work is not None:
            values |= {"work": self.work, "target": self.target}
        else:
            values |= {"whole": self.whole, "files": {name: _plain(self.files[name]) for name in sorted(self.files)}}
        checksum = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        return json.dumps({**values, "checksum": checksum}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Marker | None":
        """The marker of a folder, None where there is none.

        Raises:
            NotOurs: there is a file of that name which is not what we wrote.
        """
        path = folder / MARKER
        if not os.path.lexists(path):
            return None
        try:
            if path.is_symlink():
                raise ValueError("a link")
            text = read_text(path, kind=NotOurs)
            values = parse_json(text, "it", NotOurs)
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']!r}")
            if "work" in values:
                marker = cls(work=str(values["work"]), target=values["target"])
            else:
                files = {name: _entry(entry) for name, entry in values["files"].items()}
                if outside := [name for name in files if not safe_name(name)]:
                    raise ValueError(f"{outside[0]!r:.80} is not inside of the folder")
                marker = cls(files, bool(values["whole"]))
            if marker.text() != text:
                raise ValueError("it does not agree with its own checksum")
        except FileNotFoundError:
            return None
        except (NotOurs, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise NotOurs(
                f"{path} is not what mocte-ds wrote ({error}), so that nothing in {folder} is shown to be ours. "
                "Nothing was changed; name another folder, or remove that file and what you do not need."
            ) from error
        return marker

    def write(self, folder: Path, work: Path) -> None:
        """Write it in one move, onto the disk.

        Args:
            folder: that it is about.
            work: a folder of unfinished work in the same file system.

        Raises:
            OSError: it cannot be written.
        """
        pending = work / secrets.token_hex(8)
        write_new(pending, self.text().encode())
        os.replace(pending, folder / MARKER)

    def with_files(self, files: Mapping[str, Entry], without: Iterable[str] = ()) -> "Marker":
        """The marker with some files more, and others less."""
        gone = set(without)
        kept = {name: entry for name, entry in self.files.items() if name not in gone}
        return Marker({**kept, **files}, self.whole)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process changes the marker of a folder; the kernel frees the lock of a killed process."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _plain(entry: Entry) -> dict[str, Any]:
    versions = [[facts.bytes, facts.sha256] for facts in entry.versions]
    return {"by": entry.by, "grows": entry.grows, "versions": versions}


def _entry(values: dict[str, Any]) -> Entry:
    return Entry(values["by"], tuple(FileFacts(*facts) for facts in values["versions"]), values["grows"])


def safe_name(name: str) -> bool:
    """Whether a name stays inside of its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and bool(path.parts) and all(map(is_file_name, path.parts))
