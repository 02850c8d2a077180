"""The tables of a run's report, as HTML."""

import math
from collections.abc import Sequence
from html import escape

from mocte_ds.report import ledger
from mocte_ds.report.figures.loss import validation_series
from mocte_ds.report.run import Row, Run
from mocte_ds.report.scores import scores
from mocte_ds.report.summary import budget
from mocte_ds.report.wording import MISSING, decimal, duration, flops, integer, percent, plural, significant, size

HAPPENED = ("emergence", "refresh", "freeze", "thaw", "resume")


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> str:
    """An HTML table that turns into cards on a narrow screen.

    Args:
        name: its id.
        head: names of the columns.
        rows: cells as plain text.
        kinds: a letter a column: ``n`` a number, ``w`` a few words that stay on one line, ``t`` text.
    """
    cell = [{"n": "", "w": ' class="text word"', "t": ' class="text"'}[kind] for kind in kinds]
    lines = [f'<table id="{name}"><thead><tr>']
    lines += [f'<th scope="col"{cell[i]}>{escape(title)}</th>' for i, title in enumerate(head)]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = "".join(
            f'<td{cell[i]} data-label="{escape(head[i])}">{escape(text)}</td>' for i, text in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def validation_table(run: Run) -> str:
    """Validation loss of every domain at the first and the last evaluation."""
    rows = []
    for domain in [*run.domains, "mean"]:
        _, losses = validation_series(run, domain)
        if losses:
            perplexity = decimal(math.exp(losses[-1]), 2) if losses[-1] < 20 else MISSING
            change = f"{losses[-1] - losses[0]:+.4f}" if len(losses) > 1 else MISSING
            rows.append([domain, decimal(losses[0]), decimal(losses[-1]), change, perplexity, integer(len(losses))])
    if not rows:
        return "<p>Not in the log yet.</p>"
    head = ["domain", "first loss (nats)", "last loss (nats)", "change", "last perplexity", "evaluations"]
    return table("validation-table", head, rows, "tnnnnn")


def ledger_table(run: Run) -> str:
    """FLOPs by component."""
    whole = ledger.total(run)
    if not whole:
        return "<p>The run has not written its ledger yet.</p>"
    rows = [_ledger_row(run, name, whole) for name in ledger.spent(run)]
    rows.append(["all", "everything that training spent", flops(whole), "100.00 %"])
    rows += [_ledger_row(run, name, whole) for name in ledger.beside(run)]
    return table("ledger-table", ["component", "what it is", "FLOPs", "share of all"], rows, "wtnn")


def _ledger_row(run: Run, name: str, whole: float) -> list[str]:
    return [name, ledger.COMPONENTS.get(name, ""), flops(run.ledger[name]), percent(run.ledger[name] / whole)]


def ledger_remark(run: Run) -> str:
    """Whether the ledger and the log of steps agree on the sum of FLOPs; empty if one of them is missing."""
    logged = [row["flops"] for row in run.metrics if row.get("flops") is not None]
    whole = ledger.total(run)
    if not logged or not whole:
        return ""
    difference = whole / logged[-1] - 1 if logged[-1] else math.inf
    if abs(difference) < 0.005:
        return f"The log of steps counts the same sum ({flops(logged[-1])}) to within half a per cent."
    return (
        f"The log of steps counts {flops(logged[-1])} at its last step, the ledger {percent(difference, 1)} more or "
        f"less: they were not written at the same moment, or one of them misses a part."
    )


def seconds_table(run: Run) -> str:
    """Seconds of the checks by part, against the wall time of training."""
    parts, wall = ledger.check_seconds(run), ledger.wall_seconds(run)
    if not parts:
        return "<p>There has been no check yet.</p>"
    rows = [[part, duration(value), percent(value / wall) if wall else MISSING] for part, value in parts.items()]
    whole = sum(parts.values())
    rows.append(["all checks", duration(whole), percent(whole / wall) if wall else MISSING])
    if wall:
        rows.append(["training, its checks and validations", duration(wall), "100.00 %"])
    saves = [event["seconds"] for event in run.of_kind("save") if event.get("seconds") is not None]
    if saves:
        share = percent(sum(saves) / wall) if wall else MISSING
        rows.append([f"{plural(len(saves), 'save')}, beside training", duration(sum(saves)), share])
    return table(
        "seconds-table",
        [f"part of {plural(len(run.checks), 'check')}", "seconds on rank 0", "share of training"],
        rows,
        "tnn",
    )


def events_table(run: Run) -> str:
    """Emergences, freezes, thaws and resumes, with their reasons."""
    events = run.of_kind(*HAPPENED)
    if not events:
        return "<p>Nothing has happened yet: no emergence, no freeze.</p>"
    planned = budget(run)
    rows = []
    for event in events:
        share = percent(event["step"] / planned, 1) if planned else MISSING
        rows.append([integer(event["step"]), share, event["event"], _who(run, event), _reason(event), _numbers(event)])
    head = ["step", "of the budget", "event", "who", "reason", "numbers"]
    return table("events-table", head, rows, "nnwwtt")


def other_events(run: Run) -> str:
    """How many events of the kinds that the table leaves out."""
    counts: dict[str, int] = {}
    for event in run.events:
        if event["event"] not in HAPPENED:
            counts[event["event"]] = counts.get(event["event"], 0) + 1
    return ", ".join(plural(count, f"{kind} event") for kind, count in counts.items())


def _who(run: Run, event: Row) -> str:
    if event.get("block") is None:
        return "run"
    label = run.blocks.get(event["block"], f"block {event['block']}")
    return label if event.get("expert") is None else f"{label}, expert {event['expert']}"


def _reason(event: Row) -> str:
    if event["event"] == "resume" and event.get("checkpoint"):
        return f"went on from {event['checkpoint']}"
    return str(event.get("reason") or MISSING)


def _numbers(event: Row) -> str:
    parts = []
    if event.get("clusters") is not None:
        parts.append(f"K {event['clusters']}")
    if event.get("lambda") is not None:
        parts.append(f"λ {significant(event['lambda'])}")
    if event.get("loss_before") is not None and event.get("loss_after") is not None:
        parts.append(f"loss {decimal(event['loss_before'])} → {decimal(event['loss_after'])}")
    if event.get("output_change") is not None:
        parts.append(f"block's output moved by {percent(event['output_change'])}")
    before, after = event.get("optimizer_bytes_before"), event.get("optimizer_bytes_after")
    if before and after and None not in [*before, *after]:
        parts.append(f"optimizer {size(sum(before))} → {size(sum(after))}")
    return ", ".join(parts) or MISSING


def scores_table(run: Run) -> str:
    """Results of lm-eval."""
    found = scores(run)
    if not found:
        if run.evaluation:
            return "<p>evaluation/results.json has no results in lm-eval's form.</p>"
        return "<p>The run has not been evaluated on tasks yet.</p>"
    rows = [
        [
            s.task,
            s.metric,
            decimal(s.value),
            "±" + decimal(s.error) if s.error is not None else MISSING,
            integer(s.samples),
        ]
        for s in found
    ]
    return table("scores-table", ["task", "metric", "value", "standard error", "samples"], rows, "ttnnn")
