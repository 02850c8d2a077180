"""The tables of a run's report on loss, cost and tasks."""

import math

from mocte_ds.report import ledger
from mocte_ds.report.facts import is_of_script
from mocte_ds.report.figures.loss import validation_series
from mocte_ds.report.markup import paragraph, table
from mocte_ds.report.run import Run
from mocte_ds.report.scores import Score, scores
from mocte_ds.report.wording import MISSING, decimal, duration, flops, integer, listing, percent, plural


def validation_table(run: Run) -> str:
    """Validation loss of every domain at the first and the last validation."""
    rows = []
    for domain in [*run.domains, "mean"]:
        _, losses = validation_series(run, domain)
        if losses:
            perplexity = decimal(math.exp(losses[-1]), 2) if losses[-1] < 20 else MISSING
            change = f"{losses[-1] - losses[0]:+.4f}" if len(losses) > 1 else MISSING
            rows.append([domain, decimal(losses[0]), decimal(losses[-1]), change, perplexity, integer(len(losses))])
    if not rows:
        own = "No validation is in the log: a script tells its own by engine.log_validation."
        return paragraph(own if is_of_script(run) else "Not in the log yet.")
    head = ["domain", "first loss (nats)", "last loss (nats)", "change", "last perplexity", "validations"]
    remark = "Loss per token of held-out text; mean: over the domains, each counted alike; perplexity: exp(loss)."
    return table("validation-table", head, rows, "tnnnnn") + paragraph(remark, "soft")


def ledger_table(run: Run) -> str:
    """FLOPs by component, and whether the log of steps agrees with their sum."""
    whole = ledger.total(run)
    if not whole:
        own = "There is no ledger: FLOPs of a script's own model are not counted."
        return paragraph(own if is_of_script(run) else "The run has not written its ledger yet.")
    rows = [_ledger_row(run, name) for name in ledger.spent(run)]
    rows.append(["all", "everything that training spent", flops(whole), "100.00 %"])
    rows += [_ledger_row(run, name) for name in ledger.beside(run)]
    head = ["component", "what it is", "FLOPs", "share of all"]
    remark = "Shares are of everything that training spent; what was not spent, of what would have been spent with it. "
    return table("ledger-table", head, rows, "wtnn") + paragraph(remark + ledger_remark(run), "soft")


def _ledger_row(run: Run, name: str) -> list[str]:
    return [name, ledger.COMPONENTS.get(name, ""), flops(run.ledger[name]), percent(ledger.share(run, name))]


def ledger_remark(run: Run) -> str:
    """Whether the ledger and the log of steps agree on the sum of FLOPs; empty if one of them is missing."""
    logged = [row["flops"] for row in run.metrics if row.get("flops")]
    whole = ledger.total(run)
    if not logged or not whole:
        return ""
    difference = whole / logged[-1] - 1
    if abs(difference) < 0.005:
        return f"The log of steps counts the same sum ({flops(logged[-1])}) to within half a per cent."
    how = "more" if difference > 0 else "less"
    return (
        f"The log of steps counts {flops(logged[-1])} at its last step, the ledger {percent(abs(difference), 1)} "
        f"{how}: the ledger is written with every checkpoint, so one of them is older; or one of them misses a part."
    )


def seconds_table(run: Run) -> str:
    """Seconds of the checks by part, against the wall time of training."""
    parts, wall = ledger.check_seconds(run), ledger.wall_seconds(run)
    if not parts:
        return paragraph("There has been no check yet.")
    rows = {**parts, "all checks": sum(parts.values())}
    if wall:
        rows["training, its checks and validations"] = wall
    saves = [event["seconds"] for event in run.of_kind("save") if event.get("seconds") is not None]
    if saves:
        rows[f"{plural(len(saves), 'save')}, beside training"] = sum(saves)
    lines = [[name, duration(value), percent(value / wall) if wall else MISSING] for name, value in rows.items()]
    head = [f"part of {plural(len(run.checks), 'check')}", "seconds on rank 0", "share of training"]
    return table("seconds-table", head, lines, "tnn")


def scores_table(run: Run) -> str:
    """Results on tasks, and how many of them are better than guessing."""
    found = scores(run)
    if not found:
        if run.evaluation:
            return paragraph("evaluation/results.json has no results that tools/evaluate.py or lm-eval would write.")
        return paragraph("The run has not been evaluated on tasks yet; tools/evaluate.py does that.")
    rows = []
    for score in found:
        error = "±" + decimal(score.error) if score.error is not None else MISSING
        rows.append(
            [score.task, score.metric, decimal(score.value), error, decimal(score.chance, 2), integer(score.items)]
        )
    head = ["task", "metric", "value", "standard error", "chance", "items"]
    return table("scores-table", head, rows, "ttnnnn") + paragraph(scores_remark(run), "soft")


def _named(found: list[Score]) -> str:
    return listing([f"{score.task} ({score.metric})" for score in found])


def scores_remark(run: Run) -> str:
    """What to make of the scores, and how they were made."""
    known = [score.above_chance for score in scores(run) if score.above_chance is not None]
    text = "Chance: what guessing gives. "
    if known:
        text += f"{sum(known)} of {plural(len(known), 'value')} with a known chance "
        text += f"{'is' if sum(known) == 1 else 'are'} more than two standard errors above it. "
        below = [score for score in scores(run) if score.below_chance]
        within = [score for score in scores(run) if score.above_chance is False and not score.below_chance]
        text += f"Within two standard errors of chance, so that no skill is shown: {_named(within)}. " if within else ""
        text += f"Below chance by more than two standard errors: {_named(below)}. " if below else ""
    limit, version = run.evaluation.get("limit"), run.evaluation.get("lm_eval")
    text += f"The first {integer(limit)} items of each task were used. " if isinstance(limit, int) else ""
    return text + (f"lm-eval {version}." if version else "")
