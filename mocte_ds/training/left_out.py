"""Batches of the data that a run leaves out, because a step on them had a loss that is no number."""

from pathlib import Path

from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_object
from mocte_ds.training.run_folder import write_json

FILE = "left_out.json"
"""In the run's folder."""


class LeftOut:
    """Positions in the data at which the batches begin that are left out; read when a run starts."""

    def __init__(self, out: Path) -> None:
        """Read them.

        Args:
            out: the run's folder.

        Raises:
            CheckpointError: the file is damaged.
        """
        self._out, self.starts = out, list[int]()
        if not (out / FILE).exists():
            return
        try:
            starts = read_object(out / FILE)["batches"]
            if not isinstance(starts, list) or any(type(start) is not int or start < 0 for start in starts):
                raise ValueError(f"batches = {starts!r}")
        except (ConfigError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"{out / FILE} is damaged ({error}): without it the run would train on batches that it has left out. "
                'Restore it, or write {"batches": []} into it.'
            ) from error
        self.starts = starts

    def room(self, limit: int) -> bool:
        """Whether one more may be left out."""
        return len(self.starts) < limit

    def add(self, start: int) -> None:
        """Leave out one more batch from the next start on.

        Raises:
            MocteError: it cannot be written.
        """
        write_json(self._out / FILE, {"batches": [*self.starts, start]})
