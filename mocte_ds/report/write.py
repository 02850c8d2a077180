"""Write a run's report: draw the figures, put them on the page, save both."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from mocte_ds.errors import MocteError
from mocte_ds.report.facts import budget
from mocte_ds.report.figures import ALL, png
from mocte_ds.report.page import page
from mocte_ds.report.reader import read_run
from mocte_ds.report.summary import emerged_blocks, frozen_experts, sentences


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
        MocteError: no run there, or the report cannot be written.
    """
    run = read_run(folder)
    out = Path(out) if out is not None else run.folder / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MocteError(
            f"cannot write the report into {out}: {error.strerror}. Give another folder with --out."
        ) from error
    missing = {name: reason for name, kind in ALL.items() if (reason := kind.reason_missing(run)) is not None}
    todo = [(name, narrow) for name in ALL if name not in missing for narrow in (False, True)]
    drawn: dict[str, dict[bool, bytes]] = {}
    for name, narrow in tqdm(todo, desc="figures", unit="figure", disable=not progress):
        drawn.setdefault(name, {})[narrow] = png(ALL[name], run, narrow)
    for name in ALL:
        # An older report may have had a figure that this one has no data for.
        for narrow in (False, True):
            _path(out, name, narrow).unlink(missing_ok=True)
            if name in drawn:
                _path(out, name, narrow).write_bytes(drawn[name][narrow])
    index = out / "index.html"
    index.write_text(page(run, {name: (both[False], both[True]) for name, both in drawn.items()}), encoding="utf-8")
    return {
        "page": str(index),
        "figures": {name: str(_path(out, name, False)) for name in drawn},
        "missing": missing,
        "summary": sentences(run),
        "steps": run.metrics[-1]["step"],
        "budget": budget(run),
        "tokens": run.tokens,
        "emerged": sorted(emerged_blocks(run)),
        "frozen": [list(who) for who in frozen_experts(run)],
        "notes": run.notes,
    }


def _path(out: Path, name: str, narrow: bool) -> Path:
    return out / f"{name}{'_narrow' if narrow else ''}.png"
