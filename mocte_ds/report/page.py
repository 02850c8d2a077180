"""The report's page: one HTML file with everything in it, readable without a network and without JavaScript."""

import base64
from collections.abc import Mapping
from html import escape

from mocte_ds.report import tables, words
from mocte_ds.report.figures import ALL, FigureKind
from mocte_ds.report.overview import everything, fact_rows
from mocte_ds.report.run import Run
from mocte_ds.report.style import CSS
from mocte_ds.report.summary import sentences, tiles

SECTIONS = {
    "happened": "What happened",
    "words": "What MO-CTE is",
    "loss": "Loss",
    "structure": "Structure in the features",
    "experts": "Experts",
    "cost": "What it cost",
    "events": "Events",
    "tasks": "Tasks",
    "facts": "The run",
}

MEAN_REMARK = "Loss per token of held-out text; mean: over the domains, each counted alike; perplexity: exp(loss)."

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
        f"<h1>{escape(title)}</h1>",
        "<nav>" + "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in SECTIONS.items()) + "</nav>",
        _heading("happened"),
        '<div class="happened">' + "".join(f"<p>{escape(text)}</p>" for text in sentences(run)) + "</div>",
        '<dl class="tiles">'
        + "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in tiles(run))
        + "</dl>",
        _heading("words"),
        _introduction(),
        _heading("loss"),
        show("loss"),
        "<h3>Validation loss by domain</h3>",
        tables.validation_table(run),
        f'<p class="soft">{escape(MEAN_REMARK)}</p>',
        show("clocks"),
        _heading("structure"),
        show("spectrum"),
        show("clusters"),
        show("projection"),
        _heading("experts"),
        show("domains"),
        show("load"),
        show("trainability"),
        _heading("cost"),
        show("optimizer"),
        show("flops"),
        "<h3>FLOPs by component</h3>",
        tables.ledger_table(run),
        f'<p class="soft">{escape(tables.ledger_remark(run))}</p>',
        "<h3>Seconds of the checks</h3>",
        tables.seconds_table(run),
        _heading("events"),
        tables.events_table(run),
        _also(run),
        _heading("tasks"),
        "<p>Scores of the trained model on tasks of lm-eval.</p>",
        tables.scores_table(run),
        _heading("facts"),
        _facts(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _heading(name: str) -> str:
    return f'<h2 id="{name}">{escape(SECTIONS[name])}</h2>'


def _introduction() -> str:
    stages = "".join(f"<li><b>{escape(name)}</b>{escape(text)}</li>" for name, text in words.STAGES)
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in words.WORDS)
    return f'<p>{escape(words.INTRODUCTION)}</p><ol class="stages">{stages}</ol><dl class="words">{meanings}</dl>'


def _figure(kind: FigureKind, run: Run, picture: tuple[bytes, bytes] | None) -> str:
    head = f"<h3>{escape(kind.title)}</h3>"
    if picture is None:
        return f'{head}<p class="absent" id="figure-{kind.name}">Not drawn: {escape(kind.missing(run) or "")}</p>'
    wide, narrow = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in picture)
    caption = kind.caption(run)
    reading = f'<span class="read">How to read it: {escape(kind.reading)}</span>'
    return (
        f'{head}<figure id="figure-{kind.name}"><picture><source media="(max-width:700px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{escape(kind.title)}. {escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)} {reading}</figcaption></figure>"
    )


def _also(run: Run) -> str:
    others = tables.other_events(run)
    return f'<p class="soft">Also in the log: {escape(others)}.</p>' if others else ""


def _facts(run: Run) -> str:
    rows = [list(row) for row in fact_rows(run)]
    parts = [tables.table("facts-table", ["what", "value"], rows, "tt")]
    whole = everything(run)
    if whole:
        parts.append(f"<details><summary>All of run.json</summary><pre>{escape(whole)}</pre></details>")
    else:
        parts.append("<p>The run has no readable run.json, so its settings are not known here.</p>")
    if run.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
        parts.append(f'<h3>What the report left out</h3><ul id="notes">{notes}</ul>')
    return "".join(parts)
