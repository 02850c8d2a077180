"""Serves lm-eval's own task definitions from a folder of benchmark data: nothing is looked for in a network."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from mocte_ds.errors import ConfigError, DataError, NotOurs
from mocte_ds.evaluation.benchmarks.catalogue import DEFAULT
from mocte_ds.evaluation.benchmarks.fill import TOOL
from mocte_ds.evaluation.benchmarks.run_code import CodeEval
from mocte_ds.ownership import hash_file
from mocte_ds.ownership.marker import Marker

_LOCAL = ("arrow", "csv", "json", "parquet", "text")
"""What `load_dataset` reads from files that a task names."""
_CODE = "code_eval"


class Benchmarks:
    """A folder that tools/get_benchmarks.py has filled."""

    def __init__(self, folder: str | Path) -> None:
        """Look what it holds.

        Raises:
            ConfigError: it is not such a folder.
        """
        self.folder = Path(folder)
        try:
            marker = Marker.read(self.folder) if self.folder.is_dir() else None
        except NotOurs as error:
            raise ConfigError(f"{folder} is damaged: {error}") from error
        files = marker.files if marker is not None and marker.whole else {}
        self._files = {name: entry for name, entry in files.items() if entry.by == TOOL and name.endswith(".parquet")}
        if not self._files:
            raise ConfigError(f"{folder} holds no data of standard tasks; tools/get_benchmarks.py {folder} fills it.")

    def load(self, path: str, name: str | None = None, split: str | None = None, **_how: Any) -> Any:
        """What `datasets.load_dataset` would return.

        Args:
            path: of the data set, as task files name it.
            name: of its configuration; None: the only one.
            split: one split; None: all that are there, as a `DatasetDict`.
            **_how: about downloads.

        Raises:
            ConfigError: the folder does not have it; says what it has.
            DataError: a file is not what the tool wrote.
        """
        start = f"{path}/{name or DEFAULT}/"
        names = [file for file in self._files if file.startswith(start)]
        if not names:
            others = sorted(
                {file.removeprefix(f"{path}/").split("/")[0] for file in self._files if file.startswith(path)}
            )
            has = f"of {path} it has {', '.join(others)[:300]}" if others else f"it has {', '.join(self._paths())}"
            raise ConfigError(
                f"{self.folder} does not have {path} ({name or DEFAULT}), which a task asks for; {has}. If your cache "
                "of Hugging Face datasets has it: tools/get_benchmarks.py ANOTHER_FOLDER --from-cache."
            )
        splits = _splits(f"{self.folder / path} ({name or DEFAULT})", {Path(f).stem: self._read(f) for f in names})
        return splits if split is None else splits[split]

    def _paths(self) -> list[str]:
        return sorted({file.rsplit("/", 2)[0] for file in self._files})

    def _read(self, name: str) -> Any:
        """A file as a `datasets.Dataset` in memory."""
        import datasets
        import pyarrow.parquet

        path = self.folder / name
        try:
            if hash_file(path) not in self._files[name].versions:
                raise DataError(f"{path} is not what tools/get_benchmarks.py wrote; fill the folder again.")
            return datasets.Dataset(pyarrow.parquet.read_table(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; fill the folder again.") from error

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Within it `datasets.load_dataset` finds what the folder has, and refuses everything else by name.

        Files that a task names itself are read as always. `evaluate.load` finds the metric of HumanEval.
        """
        import datasets

        usual = datasets.load_dataset

        def load_dataset(path: str, name: str | None = None, *args: Any, **how: Any) -> Any:
            if path in _LOCAL:
                return usual(path, name, *args, **how)
            return self.load(path, name, **how)

        def load(path: str, *_args: Any, **_how: Any) -> Any:
            if path != _CODE:
                raise ConfigError(f"a task asks for the metric {path} of Hugging Face, which needs a network.")
            return CodeEval()

        with mock.patch.object(datasets, "load_dataset", load_dataset), _metrics(load):
            yield


@contextlib.contextmanager
def _metrics(load: Callable[..., Any]) -> Iterator[None]:
    """Within it `import evaluate` gives a module whose `load` is this one.

    The package's own is not there to be changed where a script of the name evaluate.py hides it.
    """
    name, usual = "evaluate", sys.modules.get("evaluate")
    metrics = ModuleType(name)
    metrics.load = load  # type: ignore[attr-defined]
    sys.modules[name] = metrics
    try:
        yield
    finally:
        del sys.modules[name]
        if usual is not None:
            sys.modules[name] = usual


def _splits(where: str, found: dict[str, Any]) -> Any:
    """A `DatasetDict` that says what it lacks.

    Tasks read the training split when they are made, also where they draw no examples from it: an empty one stands in,
    and whoever draws from it is refused (see mocte_ds.evaluation.selection).
    """
    import datasets

    class Splits(datasets.DatasetDict):
        def __missing__(self, name: object) -> Any:
            if str(name) == "train":
                return next(iter(self.values())).select([])
            raise ConfigError(f"{where} has no split {name}, only {', '.join(self)}.")

    return Splits(found)
