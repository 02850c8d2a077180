"""A corpus is a folder with one file, or one subfolder of files, for each domain; every document is a text."""

import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mocte_ds.data.documents import FORMATS, DocumentFile, file_suffix
from mocte_ds.errors import DataError
from mocte_ds.ownership.marker import MARKER
from mocte_ds.text_sources.licences import FACTS_FILE, LICENCES_FILE

NOTES = (MARKER, FACTS_FILE, LICENCES_FILE)
"""What tools/get_corpus.py writes beside the texts."""
_SHOWN = 8


def embedded_corpus() -> Path:
    """The corpus that ships with the package: nine domains, 5 MB of text (NOTICE names sources and licences)."""
    return Path(__file__).parents[1] / "corpus"


@dataclass
class CorpusFiles:
    """What a folder holds."""

    domains: dict[str, list[Path]] = field(default_factory=dict)
    """Files of each domain, both in alphabetical order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Entries that are not read, relative to the folder, and why."""


def corpus_files(folder: str | Path) -> CorpusFiles:
    """Look at a folder; nothing is read yet.

    Upper and lower case of a suffix are alike. A subfolder is a domain of all files in and below it. Entries whose
    names begin with "." or "_", links to folders, and files of other formats are skipped, by name.

    Raises:
        DataError: no such folder, no usable file in it, two sources of one domain, or an entry that looks like text
            but is not a regular file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; a corpus is a folder with one file per domain: {FORMATS}.")
    found = CorpusFiles()
    origin: dict[str, str] = {}
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith((".", "_")):
            domain, files = path.name, list(_below(path, folder, found.skipped))
            if not files:
                found.skipped.setdefault(path.name, "a folder without text")
        else:
            domain, files = _domain(path.name), _usable(path, folder, found.skipped)
        if not files:
            continue
        if domain in found.domains:
            raise DataError(
                f"{folder} has two files of the domain '{domain}': {origin[domain]} and {path.name}; rename one, or "
                f"put both into a subfolder '{domain}'."
            )
        found.domains[domain], origin[domain] = files, path.name
    if not found.domains:
        seen = f" Skipped: {listed(found.skipped)}." if found.skipped else ""
        raise DataError(f"{folder} holds no DOMAIN file that can be read ({FORMATS}); put one per domain there.{seen}")
    found.domains = dict(sorted(found.domains.items()))
    return found


def read_corpus(folder: str | Path) -> dict[str, "Documents"]:
    """Documents of every domain; a file is read when its documents are iterated over. Warns of skipped entries.

    Raises:
        DataError: see :func:`corpus_files`.
    """
    found = corpus_files(folder)
    if found.skipped:
        warnings.warn(f"not read of the corpus {folder}: {listed(found.skipped)}", stacklevel=2)
    return {domain: Documents(*files, name=Path(folder) / domain) for domain, files in found.domains.items()}


class Documents:
    """Texts of one domain. Every iteration reads the files anew, so a corpus may be larger than the memory.

    Iterating raises DataError, with file and line, for an unreadable or empty file, text that is not UTF-8 and an entry
    without "text" (see :class:`mocte_ds.data.documents.DocumentFile`). Documents of nothing but white space are left
    out.
    """

    def __init__(self, *files: str | Path, name: str | Path | None = None) -> None:
        """Keep the paths; nothing is read yet.

        Args:
            *files: one or more.
            name: what messages call several files; None: the first.
        """
        self.files = [Path(file) for file in files]
        self.path = self.files[0] if len(files) == 1 or name is None else Path(name)
        """The file, or the domain's subfolder."""

    def __iter__(self) -> Iterator[str]:
        """Texts in the order of the files."""
        for file in self.files:
            empty = True
            for text in DocumentFile(file):
                empty = False
                yield text
            if empty:
                raise DataError(f"{file} holds no document with text; fill it or remove it.")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name not in NOTES)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}.") from error


def _below(folder: Path, top: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """Usable files in and below a folder."""
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith((".", "_")):
            yield from _below(path, top, skipped)
        else:
            yield from _usable(path, top, skipped)


def _usable(path: Path, top: Path, skipped: dict[str, str]) -> list[Path]:
    """The file, or nothing and a reason in ``skipped``."""
    reason = _reason(path)
    if reason:
        skipped[str(path.relative_to(top))] = reason
    return [] if reason else [path]


def _reason(path: Path) -> str:
    """Why an entry is skipped; empty for a file to read."""
    if path.name.startswith((".", "_")):
        return 'names with "." or "_" in front are left out'
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if file_suffix(path.name):
            raise DataError(f"{path} cannot be read: {error.strerror or error}; mend or remove the link.") from error
        return "a link to nothing"
    if stat.S_ISDIR(mode):
        return "a link to a folder; link its files"
    if not file_suffix(path.name):
        return "not a format that is read"
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is a device, pipe or socket, not a regular file; store the text in a file.")
    if path.name.lower().endswith(".zst") and not zst_is_readable():
        return "zstd is missing in this pyarrow: pip install --upgrade pyarrow, or unpack the file"
    return ""


def zst_is_readable() -> bool:
    """Whether pyarrow was built with zstd; all of its wheels are."""
    import pyarrow

    return pyarrow.Codec.is_available("zstd")


def _domain(name: str) -> str:
    return name[: len(name) - len(file_suffix(name))]


def listed(skipped: dict[str, str]) -> str:
    """The first few skipped entries and why, for a message."""
    shown = "; ".join(f"{name!r} ({reason})" for name, reason in list(skipped.items())[:_SHOWN])
    return shown + (f"; and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else "")
