"""The page of a study: one HTML file with its figures and tables, readable without a network and without JavaScript."""

from collections.abc import Sequence

from mocte_ds.report.figures.drawing import rendered
from mocte_ds.report.markup import Table, document, figure, paragraph, text
from mocte_ds.study.figures import FIGURES
from mocte_ds.study.plan import Study
from mocte_ds.study.results import RunResult
from mocte_ds.study.tables import Results


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
        parts += [found.html() for found in tables if found.name == kind]
    parts += [found.html() for found in tables if found.name not in FIGURES]
    return document(name, parts)


def _figure(kind: str, results: Results) -> list[str]:
    title, reading, draw = FIGURES[kind]
    image = rendered(lambda: draw(results))
    return [f"<h2>{text(title)}</h2>", figure(kind, title, "", reading, image)] if image else []
