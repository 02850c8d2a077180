"""Write a run's report: draw the figures, put them on the page, save both."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from mocte_ds.errors import MocteError
from mocte_ds.ownership import put, require_ours
from mocte_ds.report.facts import budget
from mocte_ds.report.figures import ALL, png
from mocte_ds.report.page import page
from mocte_ds.report.reader import read_run
from mocte_ds.report.summary import emerged_blocks, frozen_experts, sentences

_PAGE, _TOOL = "index.html", "report"


def write_report(folder: Path | str, out: Path | str | None = None, progress: bool = True) -> dict[str, Any]:
    """Make index.html and the figures' PNG files from the logs of a run.

    Args:
        folder: the run folder; the run may still be going.
        out: folder of the report; None: ``report`` in the run folder.
        progress: show a progress bar.

    Returns:
        ``page`` and ``figures`` (paths by name), ``missing`` (reason by figure), ``summary`` (three sentences)
        and a few numbers.

    Raises:
        MocteError: no run there, the report cannot be written, or somebody else's files lie under its names.
    """
    run = read_run(folder)
    out = Path(out) if out is not None else run.folder / "report"
    names = {(name, narrow): f"{name}{'_narrow' if narrow else ''}.png" for name in ALL for narrow in (False, True)}
    require_ours(out, [_PAGE, *names.values()], _TOOL)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    missing = {name: reason for name, kind in ALL.items() if (reason := kind.reason_missing(run)) is not None}
    todo = [(name, narrow) for name in ALL if name not in missing for narrow in (False, True)]
    drawn: dict[str, dict[bool, bytes]] = {}
    for name, narrow in tqdm(todo, desc="figures", unit="figure", disable=not progress):
        drawn.setdefault(name, {})[narrow] = png(ALL[name], run, narrow)
    files = {names[name, narrow]: content for name, both in drawn.items() for narrow, content in both.items()}
    # An older report may have had a figure that this one has no data for.
    stale = [name for name in names.values() if name not in files]
    text = page(run, {name: (both[False], both[True]) for name, both in drawn.items()})
    try:
        put(out, {**files, _PAGE: text.encode()}, _TOOL, drop=stale)
    except OSError as error:
        raise cannot_write(out, error) from error
    return {
        "page": str(out / _PAGE),
        "figures": {name: str(out / names[name, False]) for name in drawn},
        "missing": missing,
        "summary": sentences(run),
        "steps": run.metrics[-1]["step"],
        "budget": budget(run),
        "tokens": run.tokens,
        "emerged": sorted(emerged_blocks(run)),
        "frozen": [list(who) for who in frozen_experts(run)],
        "notes": run.notes,
    }


def cannot_write(out: Path, error: OSError) -> MocteError:
    """The error for a report that cannot be written."""
    return MocteError(f"cannot write the report into {out}: {error.strerror}. Give another folder with --out.")
