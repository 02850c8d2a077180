"""What happened in a run, in three sentences and a few numbers computed from its log."""

import math

from mocte_ds.report import ledger
from mocte_ds.report.facts import MOCTE, budget, fact, is_dense, is_of_script
from mocte_ds.report.figures.optimizer import before_experts
from mocte_ds.report.run import Row, Run
from mocte_ds.report.wording import decimal, flops, integer, listing, percent, plural, size

FEW_BLOCKS = 4


def frozen_experts(run: Run) -> list[tuple[int, int]]:
    """(block, expert) of all experts that are frozen at the end of the log."""
    state: dict[tuple[int, int], bool] = {}
    for event in run.of_kind("freeze", "thaw"):
        if event.get("block") is not None and event.get("expert") is not None:
            state[event["block"], event["expert"]] = event["event"] == "freeze"
    return sorted(who for who, frozen in state.items() if frozen)


def emerged_blocks(run: Run) -> dict[int, Row]:
    """Emergence of every block that has emerged."""
    return {event["block"]: event for event in run.of_kind("emergence") if event.get("block") is not None}


def sentences(run: Run) -> list[str]:
    """Three sentences: how training went, whether experts emerged, what freezing brought."""
    return [_training(run), _emergence(run), _freezing(run)]


def _training(run: Run) -> str:
    steps, planned = run.metrics[-1]["step"], budget(run)
    text = f"The run has done {integer(steps)} optimizer steps"
    if planned:
        text = f"The run has done {integer(steps)} of {integer(planned)} optimizer steps"
        if steps < planned:
            text += f" ({percent(steps / planned, 1)} of its budget: it is still going or was stopped)"
    text += f" and seen {integer(run.tokens)} tokens"
    if run.tokens_per_step:
        text += f", {integer(run.tokens_per_step)} a step"
    means = [row for row in run.validations if row["validation"].get("mean") is not None]
    losses = [row for row in run.metrics if row.get("loss") is not None]
    if means:
        first, last = means[0], means[-1]
        value = last["validation"]["mean"]
        text += f"; the mean validation loss is {decimal(value)} nats per token at step {integer(last['step'])}"
        if value < 20:
            text += f" (perplexity {decimal(math.exp(value), 2)})"
        if first is not last:
            text += f", from {decimal(first['validation']['mean'])} at step {integer(first['step'])}"
        if value > first["validation"]["mean"]:
            text += ", so it has risen"
    elif losses:
        text += f"; the training loss went from {decimal(losses[0]['loss'])} to {decimal(losses[-1]['loss'])} nats per "
        text += "token" + ("" if is_of_script(run) else ", and nothing has been validated yet")
    else:
        text += "; no step has a finite loss"
    return text + "."


def _emergence(run: Run) -> str:
    born, blocks = emerged_blocks(run), run.blocks
    if is_dense(run):
        return "This is a dense run: it has no blocks, so no experts can emerge."
    if not born:
        text = "No experts have emerged: every block has run its dense FFN"
        reasons = []
        for block, label in blocks.items():
            history = run.block_history(block)
            if history and history[-1][1].get("reason"):
                reasons.append(f"{label}: {history[-1][1]['reason']}")
        if reasons:
            more = f" (and {len(reasons) - 2} more)" if len(reasons) > 2 else ""
            return f"{text}; the last check says: {'; '.join(reasons[:2])}{more}."
        return text + ("; there has been no check yet." if not run.checks else ".")
    return f"Experts have emerged in {len(born)} of {plural(max(len(blocks), len(born)), 'block')}: {_births(run)}."


def _births(run: Run) -> str:
    """Which blocks have emerged and when, together by reason."""
    by_reason: dict[str, list[Row]] = {}
    for _, event in sorted(emerged_blocks(run).items()):
        by_reason.setdefault(_why(event), []).append(event)
    parts = []
    for why, events in by_reason.items():
        steps = [event["step"] for event in events]
        if len(events) > FEW_BLOCKS:
            parts.append(f"{len(events)} from step {integer(min(steps))} to step {integer(max(steps))} because {why}")
        else:
            names = [f"{run.blocks[event['block']]} at step {integer(event['step'])}" for event in events]
            parts.append(f"{listing(names)} because {why}")
    return "; ".join(parts)


def _why(event: Row) -> str:
    """The kind of reason that an emergence had; the table of events has its numbers."""
    reason = str(event.get("reason") or "")
    if reason.startswith("detected"):
        return "stable clusters were detected"
    if reason.startswith("deadline"):
        return "the deadline passed without stable clusters"
    if reason.startswith("called"):
        return "the program asked for it"
    return f"of “{reason}”" if reason else "of a reason that the log does not give"


def _freezing(run: Run) -> str:
    frozen, everything = frozen_experts(run), sum(run.experts.values())
    events, thaws = run.of_kind("freeze"), run.of_kind("thaw")
    cost, gain = ledger.overhead(run), ledger.saved(run)
    if is_dense(run):
        return "No expert could be frozen, and MO-CTE's own work took nothing."
    if not events:
        text = "No expert has been frozen"
        if fact(run, *MOCTE, "freeze", "policy") == "off":
            text += " (the freeze policy is off)"
        text += ", so freezing has saved nothing"
        if cost is not None:
            text += f", while MO-CTE's own work took {percent(cost)} of all FLOPs{_time(run)}"
        return text + "."
    text = f"{len(frozen)} of {plural(everything, 'expert')} {'is' if len(frozen) == 1 else 'are'} frozen at the end "
    text += f"({plural(len(events), 'freeze')}, {plural(len(thaws), 'thaw')})"
    if gain is not None and cost is not None:
        text += f"; that saved {percent(gain)} of the FLOPs, and MO-CTE's own work took {percent(cost)}{_time(run)}: "
        text += "a saving" if run.ledger["wgrad_saved"] > cost * ledger.total(run) else "no saving"
        text += " in computation, taken together"
    before, after = _bytes(events[0], "before"), _bytes(events[-1], "after")
    if before is not None and after is not None and not thaws:
        dense = before_experts(run)
        text += f"; the optimizer's state went from {size(before)} to {size(after)} over all ranks"
        text += f" ({size(dense)} while the model was dense)" if dense is not None else ""
    return text + "."


def _time(run: Run) -> str:
    """Share of the wall time that checks took, which may be far from their share of the FLOPs."""
    seconds, wall = sum(ledger.check_seconds(run).values()), ledger.wall_seconds(run)
    return f" (its checks {percent(seconds / wall, 1)} of the wall time)" if seconds and wall else ""


def _bytes(event: Row, when: str) -> float | None:
    values = [value for value in event.get(f"optimizer_bytes_by_rank_{when}") or [] if value is not None]
    return sum(values) if values else None


def tiles(run: Run) -> list[tuple[str, str]]:
    """A few numbers for the top of the page: (name, value)."""
    found = [("steps", integer(run.metrics[-1]["step"])), ("tokens", integer(run.tokens))]
    means = [row["validation"]["mean"] for row in run.validations if row["validation"].get("mean") is not None]
    if means:
        found.append(("mean validation loss", decimal(means[-1])))
    if run.blocks:
        found.append(("blocks with experts", f"{len(emerged_blocks(run))} of {len(run.blocks)}"))
        found.append(("experts frozen", f"{len(frozen_experts(run))} of {sum(run.experts.values())}"))
    if ledger.total(run):
        found.append(("FLOPs", flops(ledger.total(run))))
    return found
