"""The tables of a run's report on its blocks and experts, and on what happened to them."""

from mocte_ds.report.facts import budget
from mocte_ds.report.figures.domains import missing, purities
from mocte_ds.report.figures.load import loaded_blocks, unevenness
from mocte_ds.report.figures.spectrum import held
from mocte_ds.report.markup import paragraph, table
from mocte_ds.report.run import Row, Run
from mocte_ds.report.summary import emerged_blocks, frozen_experts
from mocte_ds.report.wording import MISSING, decimal, integer, percent, plural, significant, size

HAPPENED = ("emergence", "freeze", "thaw", "prefix", "resume", "stop")


def blocks_table(run: Run) -> str:
    """Every block at its last check, and its features at the last one that read them."""
    rows = []
    born, frozen, loaded = emerged_blocks(run), frozen_experts(run), loaded_blocks(run)
    for block, label in run.blocks.items():
        history = run.block_history(block)
        entry = history[-1][1] if history else {}
        read = next((found for _, found in reversed(history) if found.get("rows")), {})
        gone = sum(who == block for who, _ in frozen)
        rows.append(
            [
                label,
                f"step {integer(born[block]['step'])}" if block in born else "no",
                percent(held(read), 1),
                integer(read.get("clusters")),
                decimal(read.get("silhouette"), 2),
                decimal(read.get("stability"), 2),
                decimal(read.get("nmi"), 2),
                decimal(read.get("purity"), 2),
                decimal(_imbalance(run, block, entry, block in loaded), 2),
                f"{gone} of {run.experts[block]}",
            ]
        )
    if not rows:
        return paragraph("The run has no blocks.")
    head = ["block", "experts since", "variance held", "clusters K", "silhouette", "stability", "NMI", "purity"]
    return table("blocks-table", [*head, "load, max/mean", "frozen"], rows, "wwnnnnnnnn")


def _imbalance(run: Run, block: int, entry: Row, loaded: bool) -> float | None:
    """Largest load over mean load: of the check's own probe tokens, mean over banks; without a probe set, of the last
    steps of the log."""
    own = [value for value in entry.get("imbalance") or [] if value is not None]
    if own:
        return sum(own) / len(own)
    return unevenness(run, block)[1] if loaded else None


def purity_table(run: Run) -> str:
    """How much of each domain one expert gets: over all blocks, and in the purest block."""
    rows = []
    for domain, by_block in purities(run).items():
        block, (share, expert) = max(by_block.items(), key=lambda item: item[1][0])
        mean = sum(value for value, _ in by_block.values()) / len(by_block)
        rows.append([domain, percent(mean, 1), percent(share, 1), f"{run.blocks[block]}, expert {expert}"])
    if not rows:
        reason = missing(run) or ""
        return paragraph(reason[:1].upper() + reason[1:])
    head = ["domain", "purity, mean of the blocks", "purity, purest block", "there, most go to"]
    return table("purity-table", head, rows, "tnnt")


def events_table(run: Run) -> str:
    """Emergences, freezes (of experts and of the front), thaws, resumes and stops, with their reasons."""
    events = run.of_kind(*HAPPENED)
    if not events:
        return paragraph("Nothing has happened yet: no emergence, no freeze.")
    planned = budget(run)
    rows = []
    for event in events:
        share = percent(event["step"] / planned, 1) if planned else MISSING
        rows.append([integer(event["step"]), share, event["event"], _who(run, event), _reason(event), _numbers(event)])
    head = ["step", "of the budget", "event", "who", "reason", "numbers"]
    return table("events-table", head, rows, "nnwwtt")


def other_events(run: Run) -> str:
    """How many events of the kinds that the table leaves out; empty if there are none."""
    counts: dict[str, int] = {}
    for event in run.events:
        if event["event"] not in HAPPENED:
            counts[event["event"]] = counts.get(event["event"], 0) + 1
    parts = ", ".join(plural(count, f"{kind} event") for kind, count in counts.items())
    return f"Also in the log: {parts}." if parts else ""


def _who(run: Run, event: Row) -> str:
    if event["event"] == "prefix":
        return f"embeddings and {plural(event['layers'], 'layer')}"
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
    if event.get("gate"):
        parts.append(f"gate: {event['gate']}")
    if event.get("lambda") is not None:
        parts.append(f"λ {significant(event['lambda'])}")
    if event.get("output_change") is not None:
        parts.append(f"block's output moved by {percent(event['output_change'])}")
    before, after = event.get("optimizer_bytes_by_rank_before"), event.get("optimizer_bytes_by_rank_after")
    if before and after and None not in [*before, *after]:
        parts.append(f"optimizer {size(sum(before))} → {size(sum(after))}")
    return ", ".join(parts) or MISSING
