"""Batches of the data that a run leaves out, because a step on them had a loss that is not a number."""

from collections.abc import Sequence
from pathlib import Path

from mocte_ds.dist.collectives import from_rank_zero
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_object
from mocte_ds.logs.files import write_json
from mocte_ds.shown import shown
from mocte_ds.training.run_folder import TOOL

FILE = "left_out.json"
"""In the run's folder."""


class LeftOut:
    """Positions in the data at which the batches begin that are left out; read when a run starts."""

    def __init__(self, out: Path, data: str, axis: Axis) -> None:
        """Read them (collective).

        Args:
            out: the run's folder.
            data: what the positions depend on.
            axis: the ranks, of which the first reads.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: it is of other data.
        """
        self._out, self._data = out, data
        # A host whose file system is late must not train on other batches than the rest.
        self.starts: list[int] = from_rank_zero(self._read() if axis.rank == 0 else [], axis)

    def _read(self) -> list[int]:
        out = self._out
        if not (out / FILE).exists():
            return []
        try:
            values = read_object(out / FILE)
            starts, of = values["batches"], values.get("data", self._data)
            if not isinstance(starts, list) or any(type(start) is not int or start < 0 for start in starts):
                raise ValueError(f"batches = {starts!r}")
        except (ConfigError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"{out / FILE} is damaged ({error}): without it the run would train on batches that it has left out. "
                'Restore it, or write {"batches": []} into it.'
            ) from error
        if starts and of != self._data:
            raise ConfigError(
                f"{out / FILE} names batches of other data, or of another seed or batch size: it says {shown(of)}, the "
                f"run has {shown(self._data)}. Remove it, or take another --out."
            )
        return starts

    def room(self, limit: int, more: int = 1) -> bool:
        """Whether so many more may be left out."""
        return len(self.starts) + more <= limit

    def add(self, starts: Sequence[int]) -> None:
        """Leave out more batches from the next start on.

        Raises:
            MocteError: it cannot be written.
        """
        write_json(self._out / FILE, {"data": self._data, "batches": [*self.starts, *starts]}, TOOL)
