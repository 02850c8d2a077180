"""Where the time went: by rank, and by part of the model in steps that were profiled."""

import numpy as np

from mocte_ds.report.markup import paragraph, table
from mocte_ds.report.run import Run
from mocte_ds.report.wording import decimal, integer, percent, plural

_SHOWN = 16


def ranks_table(run: Run) -> str:
    """Working seconds of the ranks that were most often the slowest."""
    ranks = max((len(row.get("rank_seconds") or []) for row in run.metrics), default=0)
    # A run that was resumed on another number of ranks begins with rows of another width.
    rows = [row["rank_seconds"] for row in run.metrics if ranks and len(row.get("rank_seconds") or []) == ranks]
    rows = [row for row in rows if all(isinstance(value, int | float) for value in row)]
    if not rows:
        return paragraph("The log of steps has no working times of ranks.")
    seconds = np.asarray(rows, dtype=np.float64)
    p50, p95 = np.percentile(seconds, [50, 95], axis=0)
    slowest = np.bincount(seconds.argmax(axis=1), minlength=ranks)
    order = np.argsort(-slowest, kind="stable")[:_SHOWN]
    lines = [
        [
            integer(int(r)),
            decimal(p50[r], 4),
            decimal(p95[r], 4),
            integer(int(slowest[r])),
            percent(slowest[r] / len(rows)),
        ]
        for r in order
    ]
    head = ["rank", "half of the steps (s)", "95 % of the steps (s)", "times the slowest", "share of steps"]
    remark = "Seconds of work in a step, without waiting for other ranks, checks, validations and checkpoints."
    if ranks > _SHOWN:
        remark += f" The {_SHOWN} of {integer(ranks)} ranks that were most often the slowest."
    return table("ranks-table", head, lines, "nnnnn") + paragraph(remark, "soft")


def profile_table(run: Run) -> str:
    """Parts of the last profile in the log, those that took longest first."""
    profiles = run.of_kind("profile")
    if not profiles:
        return paragraph("No step was profiled; --profile STEPS of the training records some.", "soft")
    last = profiles[-1]
    parts, steps = last["parts"], last["steps"]
    total = sum(map(sum, parts.values())) or 1.0
    lines = [
        [
            name,
            decimal(1e3 * forward / steps, 1),
            decimal(1e3 * backward / steps, 1),
            percent((forward + backward) / total),
        ]
        for name, (forward, backward) in parts.items()
    ]
    remark = (
        f"Rank 0, {plural(steps, 'step')} up to step {last['step']}, {decimal(last['seconds'] / steps, 3)} s each. The "
        "profiler makes steps longer. Traces are in the run's folder profile/."
    )
    head = ["part", "forward (ms)", "backward (ms)", "share"]
    return table("profile-table", head, lines, "tnnn") + paragraph(remark, "soft")
