"""The folder that a script of a user's own logs into: who may write there, and what an earlier run has left in it."""

import contextlib
from pathlib import Path
from typing import Any

from mocte_ds.errors import MocteError
from mocte_ds.logs.files import FILES, LogFiles, cannot_write, write_json
from mocte_ds.ownership import keep_aside, require_ours
from mocte_ds.ownership.run_lock import run_lock
from mocte_ds.paths import require_folder_for

TOOL = "log_to"
FACTS = "run.json"


class LogFolder:
    """Locked for one engine, on rank 0; nothing but the lock is written before the first line."""

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Raises:
            MocteError: it cannot be made or written to, another process is at work in it, or files of others have the
                names of the logs.
        """
        require_folder_for(folder, "log_to")
        require_ours(folder, [*FILES, FACTS], TOOL)
        self.folder, self._stack = folder, contextlib.ExitStack()
        self._files: LogFiles | None = None
        try:
            self._lock = self._stack.enter_context(run_lock(folder))
        except OSError as error:
            raise cannot_write(folder, error) from error

    def begin(self, start_step: int, facts: dict[str, Any]) -> None:
        """Open the logs for what follows after a step.

        At step 0 a new run begins: logs of an earlier one are kept under another name.

        Args:
            start_step: steps that are done, by the checkpoint that was loaded.
            facts: content of run.json.

        Raises:
            MocteError: they cannot be written.
        """
        if self._files is not None:
            self._files.close()
        try:
            if not start_step:
                old = [name for name in FILES if (path := self.folder / name).is_file() and path.stat().st_size]
                keep_aside(self.folder, old, "is of an earlier run, and this one begins at step 0")
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        write_json(self.folder / FACTS, facts, TOOL)
        self._files = LogFiles(self.folder, start_step, TOOL)

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Add a line.

        Args:
            name: `metrics` or `events`.
            values: of the line.

        Raises:
            MocteError: it cannot be written, or the folder is another one by now.
        """
        assert self._files is not None  # begin() comes first
        self._lock.require_held()
        self._files.write(name, values)

    def close(self) -> None:
        """Close the logs and let go of the folder; what cannot be written any more was told before."""
        if self._files is not None:
            with contextlib.suppress(MocteError):
                self._files.note()
            self._files.close(after_error=True)
            self._files = None
        self._stack.close()
