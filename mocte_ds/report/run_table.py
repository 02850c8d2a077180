"""A run's checks and changes as tables of text: costs, one table per block with a line per check, and the events."""

from typing import Any

from mocte_ds.report import ledger
from mocte_ds.report.check_facts import (
    BLOCK_FIELDS,
    CHECK_FIELDS,
    check_facts,
    new_expert_fields,
    new_fields,
    part,
    parts_of,
    share_of_budget,
)
from mocte_ds.report.facts import budget
from mocte_ds.report.rank_loads import slowest_ranks
from mocte_ds.report.run import Row, Run
from mocte_ds.text_table import MISSING, brief, is_number, percent, spread, text_table

_NOT_LISTED = ("check", "projection", "save")


def run_facts(run: Run) -> dict[str, Any]:
    """Checks, events and notes of a run as plain values, for ``--json``."""
    return {
        "run": str(run.folder),
        "steps": run.metrics[-1]["step"],
        "budget": budget(run),
        "blocks": {str(index): name for index, name in run.blocks.items()},
        "slowest_ranks": {str(ranks): list(ratios) for ranks, ratios in slowest_ranks(run).items()},
        "checks": [check_facts(run, check) for check in run.checks],
        "events": [_event_facts(run, event) for event in happened(run)],
        "notes": run.notes,
    }


def happened(run: Run) -> list[Row]:
    """Emergences, freezes, thaws, and whatever else the log has but checks, projections and saves."""
    return [event for event in run.events if event["event"] not in _NOT_LISTED]


def run_text(run: Run, block: int | None = None) -> str:
    """All tables of a run.

    Args:
        run: the logs.
        block: show this block only; None: all.
    """
    checks = [check_facts(run, check) for check in run.checks]
    chosen = [index for index in run.blocks if block is None or index == block]
    sections = [headline(run)]
    if checks:
        sections.append("checks\n" + costs_table(checks))
    for index in chosen:
        table = block_table(checks, index)
        if table:
            sections.append(f"{run.blocks[index]}\n{table}")
    events = [event for event in happened(run) if block is None or event.get("block") in (block, None)]
    sections.append("changes\n" + events_table(run, events) if events else "no emergence, freeze or thaw yet")
    return "\n\n".join(sections)


def headline(run: Run) -> str:
    """Where the run stands, what its checks took, and what could not be read."""
    step, steps = run.metrics[-1]["step"], budget(run)
    done = f"step {step:,}" + (f" of {steps:,}" if steps else "")
    lines = [f"{run.folder}: {done}, {len(run.checks)} checks, {len(run.blocks)} blocks"]
    times = [part(check, "seconds", name) for check in run.checks for name in parts_of(run.checks, "seconds")]
    spent, wall = sum(value for value in times if is_number(value)), ledger.wall_seconds(run)
    if run.checks and wall:
        share = percent(spent / wall)
        lines.append(f"checks took {brief(spent)} s of {brief(wall)} s of training, themselves included ({share})")
    ranks = [f"{n} ranks {mean:.2f} ({most:.2f})" for n, (mean, most) in slowest_ranks(run).items()]
    if ranks:
        lines.append("rows of the fullest rank over the mean, on average and at most: " + ", ".join(ranks))
    return "\n".join(lines + [f"note: {note}" for note in run.notes])


def costs_table(checks: list[Row]) -> str:
    """One line per check: seconds and bytes of its parts, and new numbers that belong to no block."""
    seconds, moved = parts_of(checks, "seconds"), parts_of(checks, "bytes")
    extra = [new_fields(check, CHECK_FIELDS) for check in checks]
    names = list(dict.fromkeys(name for cells in extra for name in cells))
    rows = []
    for check, cells in zip(checks, extra, strict=True):
        times = [part(check, "seconds", name) for name in seconds]
        known = [value for value in times if is_number(value)]
        rows.append(
            [brief(check["step"]), percent(check["share"]), brief(check.get("tokens"))]
            + [brief(value) for value in times]
            + [brief(sum(known)) if known else MISSING]
            + [brief(part(check, "bytes", name)) for name in moved]
            + [cells.get(name, MISSING) for name in names]
        )
    head = ["step", "share", "tokens", *(f"{name} s" for name in seconds), "all s", *(f"{name} B" for name in moved)]
    return text_table([*head, *names], rows)


def block_table(checks: list[Row], index: int) -> str:
    """One line per check of one block; empty if no check has it."""
    entries = [(check, entry) for check in checks for entry in check["blocks"] if entry["block"] == index]
    extra = [new_fields(entry, BLOCK_FIELDS) | new_expert_fields(entry) for _, entry in entries]
    names = list(dict.fromkeys(name for cells in extra for name in cells))
    rows = []
    for (check, entry), cells in zip(entries, extra, strict=True):
        rows.append(
            [brief(check["step"]), percent(check["share"])]
            + [brief(entry.get(name)) for name in ("mode", "rows", "certificate", "certified_rank", "clusters")]
            + [_sizes(entry.get("sizes")), brief(entry.get("found"))]
            + [brief(entry.get(name)) for name in ("noise", "silhouette", "stability", "nmi", "purity")]
            + [brief(entry["load_max_mean"]), spread([entry["lambda_min"], entry["lambda_max"]])]
            + [brief(entry["frozen"])]
            + [cells.get(name, MISSING) for name in names]
        )
    head = ["step", "share", "mode", "rows", "certificate", "rank", "K", "sizes", "found", "noise", "silhouette"]
    head += ["stability", "NMI", "purity", "load", "lambda", "frozen", *names]
    return text_table(head, rows, left=("mode", "sizes", "found")) if rows else ""


def events_table(run: Run, events: list[Row]) -> str:
    """Changes in the order of happening, with their reasons."""
    rows = []
    for event in events:
        before, after = (_bytes(event, when) for when in ("before", "after"))
        sizes = (
            f"{brief(before / 1e6)} -> {brief(after / 1e6)}" if before is not None and after is not None else MISSING
        )
        numbers = [event["step"], event.get("block"), event.get("expert"), event.get("lambda")]
        step, block, expert, value = (brief(number) for number in numbers)
        share = percent(share_of_budget(run, event["step"]))
        rows.append([step, share, event["event"], block, expert, value, sizes, brief(event.get("reason"))])
    head = ["step", "share", "event", "block", "expert", "lambda", "optimizer MB", "reason"]
    return text_table(head, rows, left=("event", "reason"))


def _event_facts(run: Run, event: Row) -> Row:
    return {**event, "share": share_of_budget(run, event["step"])}


def _bytes(event: Row, when: str) -> float | None:
    """Optimizer bytes of all ranks; older logs have a list by rank under the name of the sum."""
    value = event.get(f"optimizer_bytes_{when}", event.get(f"optimizer_bytes_by_rank_{when}"))
    numbers = value if isinstance(value, list) else [value]
    return sum(numbers) if numbers and all(is_number(number) for number in numbers) else None


def _sizes(value: Any) -> str:
    """Sizes of the clusters, the largest ones where there are many."""
    if not isinstance(value, list) or not value:
        return MISSING
    shown = " ".join(brief(size) for size in value[:6])
    return shown + (f" +{len(value) - 6}" if len(value) > 6 else "")
