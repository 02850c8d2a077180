"""Write the page that compares runs."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mocte_ds.errors import MocteError
from mocte_ds.ownership import put, require_ours
from mocte_ds.report.comparison.figure import draw
from mocte_ds.report.comparison.page import page
from mocte_ds.report.comparison.tables import all_tables
from mocte_ds.report.figures.drawing import rendered
from mocte_ds.report.outcome import Outcome, outcome
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from mocte_ds.report.write import cannot_write

_PAGE, _TOOL = "index.html", "report of several runs"


def write_comparison(folders: Sequence[Path | str], out: Path | str | None = None) -> dict[str, Any]:
    """Make index.html from the logs of several runs.

    Args:
        folders: of the runs, which may still be going; two or more.
        out: folder of the page; None: `comparison` beside the first run.

    Returns:
        ``page`` (its path), ``runs`` (numbers of each by its name) and ``notes`` by name.

    Raises:
        MocteError: a folder is not a run's or named twice, the page cannot be written, or somebody else's file has its
            name.
    """
    runs = {name: read_run(folder) for name, folder in named(folders).items()}
    out = Path(out) if out is not None else Path(folders[0]).resolve().parent / "comparison"
    require_ours(out, [_PAGE], _TOOL)
    outcomes = {name: Outcome(**outcome(run)) for name, run in runs.items()}
    text = page(runs, all_tables(runs, outcomes), _pictures(runs))
    try:
        put(out, {_PAGE: text.encode()}, _TOOL)
    except OSError as error:
        raise cannot_write(out, error) from error
    return {
        "page": str(out / _PAGE),
        "runs": {name: asdict(found) for name, found in outcomes.items()},
        "notes": {name: run.notes for name, run in runs.items()},
    }


def named(folders: Sequence[Path | str]) -> dict[str, Path]:
    """Folders by the shortest names that tell them apart: their own, or from where their paths part."""
    paths = [Path(folder).resolve() for folder in folders]
    twice = next((path for number, path in enumerate(paths) if path in paths[:number]), None)
    if twice is not None:
        raise MocteError(f"{twice} was named twice; name each run once.")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        parent = os.path.commonpath(paths)
        names = [os.path.relpath(path, parent) for path in paths]
    return dict(zip(names, paths, strict=True))


def _pictures(runs: Mapping[str, Run]) -> tuple[bytes, bytes] | None:
    wide, narrow = (rendered(functools.partial(draw, runs, for_phones)) for for_phones in (False, True))
    return (wide, narrow) if wide is not None and narrow is not None else None
