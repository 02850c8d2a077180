"""Several runs by block: when experts emerged, what the clusters were like, and how far gradients disagreed."""

import re
from collections.abc import Sequence
from typing import Any

from mocte_ds.report.run import Row, Run
from mocte_ds.text_table import MISSING, brief, is_number, text_table

CLUSTERS = ("nmi", "purity", "silhouette", "clusters", "certificate")
CONFLICT = ("cosine", "R", "Q", "cluster_cosine", "cluster_R", "cluster_Q", "kappa")
_SEED = re.compile(r"-seed\d+$")


def several_facts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the checks of each run say of each block.

    Args:
        runs: the logs.

    Returns:
        For each run and block "run", "arm" (the folder without its seed), "block", "emerged" (step, or None),
        "how" (`clusters`, `deadline`, another reason's first word, or None), "first_found" (step of the first check
        that found clusters, or None), "found" (share of the checks that looked in all runs), "before" and "after" with
        :data:`CLUSTERS` and :data:`CONFLICT`, None where no check has a number. Before: of the last check that has one,
        up to the first emergence in any of the runs, so that a dense run is read at the same time as the others. After:
        means over all checks in the second half of the run.
    """
    emergences = [event["step"] for run in runs for event in run.of_kind("emergence")]
    first = min(emergences, default=None)
    one_parent = len({run.folder.parent for run in runs}) == 1
    facts = []
    for run in runs:
        for block in run.blocks:
            entries = [(check["step"], entry) for check in run.checks for entry in _of(check, block)]
            event = next((e for e in run.of_kind("emergence") if e.get("block") == block), None)
            found = [step for step, entry in entries if entry.get("found") is True]
            looked = set.intersection(*[_looked(other, block) for other in runs if block in other.blocks])
            half = run.metrics[-1]["step"] / 2
            facts.append(
                {
                    "run": str(run.folder),
                    "arm": _SEED.sub("", run.folder.name if one_parent else str(run.folder)),
                    "block": block,
                    "emerged": event and event["step"],
                    "how": event and _how(str(event.get("reason") or "")),
                    "first_found": min(found, default=None),
                    "found": len(looked.intersection(found)) / len(looked) if looked else None,
                    "before": _means([(s, e) for s, e in entries if first is not None and s <= first], last=True),
                    "after": _means([(s, e) for s, e in entries if s > half], last=False),
                }
            )
    return facts


def several_text(facts: Sequence[dict[str, Any]]) -> str:
    """The facts as tables; runs whose names differ in their seed alone are taken together, with their range."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for fact in facts:
        groups.setdefault((fact["arm"], fact["block"]), []).append(fact)
    sections = ["emergence\n" + _emergences(groups)]
    for title, names in (("clusters", CLUSTERS), ("conflict between gradients", CONFLICT)):
        known = [
            name for name in names if any(f[when][name] is not None for f in facts for when in ("before", "after"))
        ]
        if known:
            sections.append(f"{title}: up to the first emergence -> second half of the run\n" + _changes(groups, known))
    return "\n\n".join(sections)


def _emergences(groups: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    rows = []
    for (arm, block), facts in groups.items():
        steps = [MISSING if f["emerged"] is None else f"{f['emerged']:,} ({f['how']})" for f in facts]
        first = [brief(f["first_found"]) for f in facts]
        rows.append([arm, str(block), str(len(facts)), ", ".join(steps), ", ".join(first), _range(facts, "found")])
    head = ["runs", "block", "number", "emerged at step", "clusters first found", "share of checks that find some"]
    return text_table(head, rows, left=("runs", "emerged at step", "clusters first found"))


def _changes(groups: dict[tuple[str, int], list[dict[str, Any]]], names: Sequence[str]) -> str:
    rows = [
        [arm, str(block)]
        + [f"{_range([f['before'] for f in facts], n)} -> {_range([f['after'] for f in facts], n)}" for n in names]
        for (arm, block), facts in groups.items()
    ]
    return text_table(["runs", "block", *names], rows, left=("runs",))


def _range(facts: Sequence[dict[str, Any]], name: str) -> str:
    """Mean over the runs, and between what they lie."""
    values = [fact[name] for fact in facts if fact[name] is not None]
    if not values:
        return MISSING
    mean, low, high = (brief(float(x), 2) for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}..{high})"


def _looked(run: Run, block: int) -> set[int]:
    """Steps of the checks that looked for clusters; after its birth a block is looked at more seldom."""
    return {check["step"] for check in run.checks for e in _of(check, block) if e.get("clusters") is not None}


def _of(check: Row, block: int) -> list[Row]:
    return [entry for entry in check.get("blocks") or [] if isinstance(entry, dict) and entry.get("block") == block]


def _how(reason: str) -> str:
    word = reason.partition(":")[0].partition(" ")[0]
    return "clusters" if word == "detected" else word or MISSING


def _means(entries: Sequence[tuple[int, Row]], last: bool) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in (*CLUSTERS, *CONFLICT):
        sections = [(entry.get("conflict") or {}) if name in CONFLICT else entry for _, entry in entries]
        values = [section[name] for section in sections if is_number(section.get(name))]
        values = values[-1:] if last else values
        found[name] = sum(values) / len(values) if values else None
    return found
