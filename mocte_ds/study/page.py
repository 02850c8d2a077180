"""The page of a study: one HTML file with its figures and tables, readable without a network and without JavaScript."""

from collections.abc import Sequence
from html import escape

from mocte_ds.report.markup import paragraph, table, text
from mocte_ds.report.style import CSS
from mocte_ds.study.figures import FIGURES, picture
from mocte_ds.study.plan import Study
from mocte_ds.study.results import RunResult
from mocte_ds.study.tables import Results, Table


def study_page(study: Study, runs: Sequence[RunResult], tables: Sequence[Table], name: str, wanted: int) -> str:
    """The study as one self-contained HTML document.

    Args:
        study: what is compared.
        runs: those that are done.
        tables: of :func:`mocte_ds.study.tables.all_tables`.
        name: of the study.
        wanted: how many runs there will be.
    """
    results = Results(study, runs)
    parts = [
        f"<h1>{text(f'Study: {name}')}</h1>",
        paragraph(
            f"{len(runs)} of {wanted} runs are done, of {len(study.arms)} arms with {len(study.seeds)} seeds, by the "
            f"run file {study.run.name} on {study.processes} processes."
        ),
    ]
    for kind in FIGURES:
        parts += _figure(kind, results)
        parts += [_table(found) for found in tables if found.name == kind]
    parts += [_table(found) for found in tables if found.name not in FIGURES]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(name)}</title><style>{CSS}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _figure(kind: str, results: Results) -> list[str]:
    title, reading, draw = FIGURES[kind]
    image = picture(draw, results)
    if image is None:
        return []
    return [
        f"<h2>{text(title)}</h2>",
        f'<figure id="figure-{kind}"><img src="{image}" alt="{escape(title)}">'
        f"<figcaption>{text(reading)}</figcaption></figure>",
    ]


def _table(found: Table) -> str:
    legend = found.legend.replace("**", "").replace("*", "")
    lines = legend.replace("\n  ", " ").split("\n")
    words = "".join(paragraph(line.removeprefix("- "), "soft") for line in lines if line)
    kinds = "w" + "n" * (len(found.head) - 1)
    return f"<h3>{text(found.title)}</h3>{table(f'table-{found.name}', found.head, found.rows, kinds)}{words}"
