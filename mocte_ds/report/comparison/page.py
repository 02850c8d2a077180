"""The page that compares runs: one HTML file, readable without a network and without JavaScript."""

from collections.abc import Mapping, Sequence

from mocte_ds.report.comparison import figure as losses
from mocte_ds.report.facts import fact
from mocte_ds.report.markup import Table, document, figure, paragraph, text
from mocte_ds.report.run import Run
from mocte_ds.report.summary import sentences
from mocte_ds.report.wording import listing


def page(runs: Mapping[str, Run], tables: Sequence[Table], pictures: tuple[bytes, bytes] | None) -> str:
    """The comparison as one self-contained HTML document.

    Args:
        runs: by name.
        tables: of :func:`mocte_ds.report.comparison.tables.all_tables`.
        pictures: the losses as PNG files, wide and narrow; None: no run has a loss.
    """
    title = f"MO-CTE runs: {listing(list(runs))}"
    parts = [f"<h1>{text(title)}</h1>", paragraph(data_remark(runs))]
    for name, run in runs.items():
        parts += [f"<h3>{text(name)}</h3>", paragraph(" ".join(sentences(run)))]
    parts.append(f"<h2>{text(losses.TITLE)}</h2>")
    if pictures is None:
        parts.append(paragraph("Not drawn: no run has a finite loss in its log.", "absent"))
    else:
        parts.append(figure("clocks", losses.TITLE, losses.caption(runs), losses.READING, *pictures))
    parts.append("<h2>Tables</h2>")
    for table in tables:
        parts.append(table.html("t" * len(table.head) if table.name == "settings" else None))
    if not any(table.name == "settings" for table in tables):
        parts.append(paragraph("No settings differ between the run.json files of the runs."))
    notes = [f"<li>{text(f'{name}: {note}')}</li>" for name, run in runs.items() for note in run.notes]
    if notes:
        parts.append(f'<h3>What was left out or corrected</h3><ul id="notes">{"".join(notes)}</ul>')
    return document(title, parts)


def data_remark(runs: Mapping[str, Run]) -> str:
    """Whether the losses are of one text."""
    manifests = {name: fact(run, "data", "manifest_sha256") for name, run in runs.items()}
    unknown = [name for name, manifest in manifests.items() if manifest is None]
    if unknown:
        return f"The log of {listing(unknown)} does not say which data it read: losses compare where the data agree."
    if len(set(manifests.values())) > 1:
        return "The runs have read different data (data.manifest_sha256): their losses are not those of one text."
    return "All runs have read the same prepared data."
