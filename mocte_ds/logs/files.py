"""metrics.jsonl and events.jsonl of a folder: a line per step or event, and no step twice after a resume."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from mocte_ds.errors import MocteError
from mocte_ds.ownership import note_growing, put

NAMES = ("metrics", "events")
FILES = tuple(f"{name}.jsonl" for name in NAMES)


class LogFiles:
    """Both files while they are open; of one process."""

    def __init__(self, folder: Path, start_step: int, by: str) -> None:
        """Open them, and drop what a run that goes on will write again.

        Args:
            folder: is made if it is not there.
            start_step: steps that are done.
            by: the tool whose files they are (see mocte_ds.ownership).

        Raises:
            MocteError: they cannot be written.
        """
        self.folder, self._by, self._failed = folder, by, False
        self._files: dict[str, TextIO] = {}
        for name in NAMES:
            path = folder / f"{name}.jsonl"
            try:
                keep_until(path, start_step, by)
                if not path.exists():
                    put(folder, {path.name: b""}, by, grows=True)
                self._files[name] = open(path, "a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise cannot_write(path, error) from error
        self.note()

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Add a line, which is on its way to the disk at once.

        Args:
            name: `metrics` or `events`.
            values: of the line.

        Raises:
            MocteError: it cannot be written.
        """
        try:
            self._files[name].write(json.dumps(values) + "\n")
        except OSError as error:
            self._failed = True
            raise cannot_write(Path(self._files[name].name), error) from error

    def note(self, others: Iterable[str] = ()) -> None:
        """Note that the files are ours as they are now; what is added to them is looked at line by line.

        Args:
            others: names of files that grow beside them.

        Raises:
            MocteError: the note cannot be written.
        """
        try:
            note_growing(self.folder, [*FILES, *others], self._by)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def close(self, after_error: bool = False) -> None:
        """Flush and close.

        Args:
            after_error: say nothing about what cannot be written any more; what happened first is to be heard.

        Raises:
            MocteError: a file cannot be written.
        """
        for file in self._files.values():
            try:
                file.close()  # writes once more what could not be written before
            except OSError as error:
                if not (after_error or self._failed):
                    raise cannot_write(Path(file.name), error) from error


def cannot_write(path: Path, error: OSError) -> MocteError:
    """The error for a file of the run that cannot be written."""
    return MocteError(
        f"cannot write {path}: {error.strerror or error}. The last good checkpoint is untouched; make room or choose "
        "another folder (--out; mocte.log or log_to), and start again from it: the run resumes."
    )


def write_json(path: Path, values: dict[str, Any], by: str) -> None:
    """Write a file in one move, so that readers never see half of it; one that is not the run's own is kept beside it.

    Args:
        path: of the file.
        values: its content.
        by: the tool whose file it is.

    Raises:
        MocteError: it cannot be written.
    """
    try:
        put(path.parent, {path.name: json.dumps(values, indent=1).encode()}, by, keep_others=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def keep_until(path: Path, step: int, by: str) -> None:
    """Drop the lines of a log that lie after ``step``, and a last line that was cut off.

    A log that somebody else has written or changed is kept under another name.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    put(path.parent, {path.name: "".join(kept).encode()}, by, keep_others=True, grows=True)
