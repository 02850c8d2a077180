"""What the checks of a run say in numbers: the log's own, those that follow from them, and fields that are new."""

from typing import Any

from mocte_ds.report.facts import budget
from mocte_ds.report.run import Row, Run, block_entries
from mocte_ds.text_table import brief, is_number, spread

# Fields that tables have a place for, or leave to the full view; any other one is shown under its own name.
CHECK_FIELDS = ("event", "step", "measured_at", "tokens", "share", "seconds", "bytes", "blocks")
BLOCK_FIELDS = (
    "block name mode rows rank singular_values explained certificate certified_rank documents clusters sizes noise "
    "largest silhouette found reason stability nmi purity load domain_load experts load_max_mean lambda_min lambda_max "
    "frozen"
).split()
EXPERT_FIELDS = ("expert", "mode", "tokens", "lambda", "rows")
_FEW = 6


def share_of_budget(run: Run, step: int) -> float | None:
    """Part of the budget that was done at a step, or None where run.json does not say the budget."""
    steps = budget(run)
    return step / steps if steps else None


def check_facts(run: Run, check: Row) -> dict[str, Any]:
    """A check as logged, with ``share`` of the budget, and in each block what follows from its numbers.

    ``load_max_mean`` of a block is the busiest expert's load over the mean; ``lambda_min`` and ``lambda_max`` the range
    of its experts' trainability; ``frozen`` the number of frozen experts. None where the log has no such numbers.
    """
    blocks = []
    for entry in block_entries(check):
        values = [expert["lambda"] for expert in experts(entry) if is_number(expert.get("lambda"))]
        modes = [expert.get("mode") for expert in experts(entry)]
        load: Any = entry.get("load")
        known = isinstance(load, list) and bool(load) and all(is_number(n) for n in load) and sum(load) > 0
        follows = {
            "load_max_mean": max(load) * len(load) / sum(load) if known else None,
            "lambda_min": min(values, default=None),
            "lambda_max": max(values, default=None),
            "frozen": modes.count("frozen") if modes else None,
        }
        blocks.append({**entry, **follows})
    return {**check, "share": share_of_budget(run, check["step"]), "blocks": blocks}


def experts(entry: Row) -> list[Row]:
    """The experts of a block's entry in a check; none where the log has none."""
    found = entry.get("experts")
    return [expert for expert in found if isinstance(expert, dict)] if isinstance(found, list) else []


def new_fields(row: Row, known: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Cells of the numeric fields that are not in ``known``.

    A list of numbers is shown by its range, a small section by its entries (``conflict.cosine``); texts and larger
    things are left to the full view of a check.
    """
    cells = {}
    for name, value in row.items():
        if name in known:
            continue
        if is_number(value):
            cells[name] = brief(value)
        elif isinstance(value, list) and any(is_number(item) for item in value):
            cells[name] = spread(value)
        elif isinstance(value, dict) and len(value) <= _FEW:
            cells |= {f"{name}.{key}": brief(item) for key, item in value.items() if is_number(item)}
    return cells


def new_expert_fields(entry: Row) -> dict[str, str]:
    """Ranges over a block's experts of their numeric fields that have no column of their own."""
    rows = experts(entry)
    names = dict.fromkeys(name for row in rows for name in row if name not in EXPERT_FIELDS)
    cells = {name: spread([row.get(name) for row in rows]) for name in names}
    return {name: cell for name, cell in cells.items() if any(is_number(row.get(name)) for row in rows)}


def parts_of(checks: list[Row], field: str) -> list[str]:
    """Names of the parts that checks log under ``seconds`` or ``bytes``."""
    sections = [check[field] for check in checks if isinstance(check.get(field), dict)]
    return list(dict.fromkeys(str(name) for section in sections for name in section))


def part(check: Row, field: str, name: str) -> Any:
    """One part of a check's ``seconds`` or ``bytes``; None where the log has none."""
    section = check.get(field)
    return section.get(name) if isinstance(section, dict) else None
