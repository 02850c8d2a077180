"""The report's page: one HTML file with everything in it, readable without a network and without JavaScript."""

from collections.abc import Mapping
from html import escape

from mocte_ds.report import expert_tables, tables, words
from mocte_ds.report.figures import ALL, FigureKind
from mocte_ds.report.markup import document, figure, paragraph, table, text
from mocte_ds.report.overview import everything, fact_rows
from mocte_ds.report.run import Run
from mocte_ds.report.summary import sentences, tiles
from mocte_ds.report.time_tables import profile_table, ranks_table

SECTIONS = {
    "happened": "What happened",
    "words": "What MO-CTE is",
    "loss": "Loss",
    "structure": "Structure in the features",
    "experts": "Experts",
    "cost": "What it cost",
    "events": "Events",
    "tasks": "Tasks",
    "glossary": "Words",
    "facts": "The run",
}

Pictures = Mapping[str, tuple[bytes, bytes]]
"""PNG files (wide, narrow) by the figure's name."""


def page(run: Run, pictures: Pictures) -> str:
    """The report as one self-contained HTML document.

    Args:
        run: the logs.
        pictures: the drawn figures; a figure that is not among them is replaced by the reason why.
    """
    title = f"MO-CTE run: {run.folder.resolve().name}"

    def show(name: str) -> str:
        return _figure(ALL[name], run, pictures.get(name))

    body = [
        f"<h1>{text(title)}</h1>",
        "<nav>" + "".join(f'<a href="#{name}">{text(label)}</a>' for name, label in SECTIONS.items()) + "</nav>",
        _heading("happened"),
        '<div class="happened">' + "".join(paragraph(sentence) for sentence in sentences(run)) + "</div>",
        '<dl class="tiles">' + "".join(f"<div>{_entry(name, value)}</div>" for name, value in tiles(run)) + "</dl>",
        _heading("words"),
        _introduction(),
        _heading("loss"),
        show("loss"),
        "<h3>Validation loss by domain</h3>",
        tables.validation_table(run),
        show("clocks"),
        _heading("structure"),
        show("spectrum"),
        show("clusters"),
        show("projection"),
        _heading("experts"),
        "<h3>Every block at its last check</h3>",
        expert_tables.blocks_table(run),
        show("domains"),
        "<h3>Purity by domain</h3>",
        expert_tables.purity_table(run),
        show("load"),
        show("trainability"),
        _heading("cost"),
        show("optimizer"),
        show("flops"),
        "<h3>FLOPs by component</h3>",
        tables.ledger_table(run),
        "<h3>Seconds of the checks</h3>",
        tables.seconds_table(run),
        "<h3>Working time of the ranks</h3>",
        ranks_table(run),
        "<h3>Parts of a profiled step</h3>",
        profile_table(run),
        _heading("events"),
        expert_tables.events_table(run),
        paragraph(expert_tables.other_events(run), "soft"),
        _heading("tasks"),
        paragraph("Scores of the trained model on tasks of lm-evaluation-harness (lm-eval)."),
        tables.scores_table(run),
        _heading("glossary"),
        f'<dl class="words">{"".join(_entry(name, meaning) for name, meaning in words.WORDS)}</dl>',
        _heading("facts"),
        _facts(run),
    ]
    return document(title, body)


def _heading(name: str) -> str:
    return f'<h2 id="{name}">{text(SECTIONS[name])}</h2>'


def _entry(name: str, value: str) -> str:
    return f"<dt>{text(name)}</dt><dd>{text(value)}</dd>"


def _introduction() -> str:
    stages = "".join(f"<li><b>{text(name)}</b>{text(meaning)}</li>" for name, meaning in words.STAGES)
    return f'{paragraph(words.INTRODUCTION)}<ol class="stages">{stages}</ol>'


def _figure(kind: FigureKind, run: Run, picture: tuple[bytes, bytes] | None) -> str:
    head = f"<h3>{text(kind.title)}</h3>"
    if picture is None:
        return f'{head}<p class="absent" id="figure-{kind.name}">Not drawn: {text(kind.reason_missing(run) or "")}</p>'
    return head + figure(kind.name, kind.title, kind.caption(run), kind.reading, *picture)


def _facts(run: Run) -> str:
    parts = [table("facts-table", ["what", "value"], [list(row) for row in fact_rows(run)], "tt")]
    whole = everything(run)
    if whole:
        parts.append(f"<details><summary>All of run.json</summary><pre>{escape(whole)}</pre></details>")
    else:
        parts.append(paragraph("The run has no readable run.json, so its settings are not known here."))
    if run.notes:
        notes = "".join(f"<li>{text(note)}</li>" for note in run.notes)
        parts.append(f'<h3>What the report left out or corrected</h3><ul id="notes">{notes}</ul>')
    return "".join(parts)
