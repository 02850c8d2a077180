"""The tables that set several runs beside each other, a row for each."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mocte_ds.report.facts import budget
from mocte_ds.report.figures.loss import column, validation_series
from mocte_ds.report.figures.optimizer import by_rank, totals
from mocte_ds.report.ledger import overhead, saved
from mocte_ds.report.markup import Table
from mocte_ds.report.outcome import Outcome
from mocte_ds.report.run import Run
from mocte_ds.report.settings import differing
from mocte_ds.report.summary import emerged_blocks
from mocte_ds.report.wording import MISSING, decimal, duration, flops, integer, percent, size

_LAST = 0.05
"""Part of the steps whose mean is the last loss of training."""
_LONGEST = 200
"""Characters of a setting."""


def all_tables(runs: Mapping[str, Run], outcomes: Mapping[str, Outcome]) -> list[Table]:
    """Every table that has rows.

    Args:
        runs: by name.
        outcomes: of the same names.
    """
    made = [_losses(runs), _events(runs, outcomes), _costs(runs, outcomes), _settings(runs)]
    return [table for table in made if table.rows]


def _losses(runs: Mapping[str, Run]) -> Table:
    domains = list(dict.fromkeys(name for run in runs.values() for name in run.domains))
    found = {name: {d: validation_series(run, d)[1] for d in [*domains, "mean"]} for name, run in runs.items()}
    shown = [domain for domain in [*domains, "mean"] if any(own[domain] for own in found.values())]
    rows = []
    for name, run in runs.items():
        losses = column(run, "loss")
        last = losses[-max(1, round(_LAST * len(losses))) :]
        training = float(np.nanmean(last)) if np.isfinite(last).any() else None
        cells = [decimal(own[-1]) if (own := found[name][domain]) else MISSING for domain in shown]
        steps = budget(run)
        done = percent(run.metrics[-1]["step"] / steps, 1) if steps else MISSING
        rows.append([name, integer(run.metrics[-1]["step"]), done, decimal(training), *cells])
    head = ["run", "step", "of its budget", "training loss", *shown]
    legend = (
        "Nats per token. **training loss**: mean of the last 20th of the steps in the log; the others: last validation "
        "by domain, and the mean of the domains, each counted alike"
    )
    return Table("losses", "Losses at the end of the logs", head, rows, legend)


def _events(runs: Mapping[str, Run], outcomes: Mapping[str, Outcome]) -> Table:
    rows = []
    for name, run in runs.items():
        own, born = outcomes[name], emerged_blocks(run)
        steps = [event["step"] for event in born.values()]
        when = MISSING
        if steps:
            first, last = integer(min(steps)), integer(max(steps))
            when = f"step {first}" if first == last else f"steps {first} to {last}"
        rows.append(
            [
                name,
                f"{own.emerged} of {len(run.blocks)}",
                when,
                integer(own.detected),
                f"{own.frozen} of {sum(run.experts.values())}",
                integer(own.freezes),
                integer(len(run.of_kind("thaw"))),
                decimal(own.imbalance, 2),
                integer(len(run.of_kind("resume"))),
            ]
        )
    head = ["run", "blocks with experts", "emerged", "by clusters", "experts frozen", "freezes", "thaws", "load"]
    legend = (
        "**by clusters**: blocks that emerged because clusters were found; **load**: the busiest expert's tokens over "
        "the mean, at the end of the log"
    )
    return Table("events", "What happened", [*head, "resumes"], rows, legend)


def _costs(runs: Mapping[str, Run], outcomes: Mapping[str, Outcome]) -> Table:
    rows = []
    for name, run in runs.items():
        own = outcomes[name]
        state = [size(value) for value in totals(run)] if by_rank(run).size else [MISSING] * 3
        seconds = own.seconds or None
        rows.append(
            [
                name,
                integer(own.tokens),
                flops(own.flops or None),
                percent(overhead(run)),
                percent(saved(run)),
                *state,
                duration(seconds),
                percent(own.check_seconds / seconds) if seconds else MISSING,
                integer(own.tokens / seconds) if seconds else MISSING,
            ]
        )
    head = ["run", "tokens", "FLOPs", "own work", "not spent", "optimizer: first", "most", "last", "wall time"]
    legend = (
        "A dash: the log does not say. **own work**: MO-CTE's share of all FLOPs; **not spent**: weight gradients of "
        "frozen experts, over what would have been spent with them; **optimizer**: masters and moments over all ranks, "
        "in the first step, at most and at the end; **checks**: their share of the wall time"
    )
    return Table("costs", "What it cost", [*head, "checks", "tokens per second"], rows, legend)


def _settings(runs: Mapping[str, Run]) -> Table:
    rows = [
        [key, *(_shown(values[name]) if name in values else MISSING for name in runs)]
        for key, values in differing(runs).items()
    ]
    silent = [name for name, run in runs.items() if not run.facts]
    legend = "From the run.json of each run; a dash: the run has no such setting."
    if silent:
        legend += f" Without a readable run.json: {', '.join(silent)}."
    return Table("settings", "Settings that differ", ["setting", *runs], rows, legend)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
