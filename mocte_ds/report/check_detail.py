"""One check of a run in full: every field of every block that the log has, and the experts below."""

from typing import Any

from mocte_ds.errors import MocteError
from mocte_ds.report.check_facts import EXPERT_FIELDS, check_facts, experts
from mocte_ds.report.run import Row, Run
from mocte_ds.report.run_table import events_table, happened
from mocte_ds.text_table import brief, percent, text_table

_APART = ("experts", "domain_load")


def chosen_checks(run: Run, which: str) -> list[Row]:
    """The checks that ``--check`` names.

    Args:
        run: the logs.
        which: the step of a check, `last` or `all`.

    Raises:
        MocteError: no such check; says which there are.
    """
    steps = [check["step"] for check in run.checks]
    if not steps:
        raise MocteError(f"{run.folder} has no check in its log yet; leave --check out.")
    if which == "all":
        return run.checks
    if which == "last":
        return run.checks[-1:]
    if not which.isdigit():
        raise MocteError(f"--check {which}: give the step of a check, `last` or `all`.")
    found = [check for check in run.checks if check["step"] == int(which)]
    if not found:
        near = min(steps, key=lambda step: abs(step - int(which)))
        raise MocteError(
            f"there is no check at step {which}: they lie between steps {steps[0]} and {steps[-1]}, the nearest one at "
            f"step {near}."
        )
    return found


def check_text(run: Run, check: Row, block: int | None = None) -> str:
    """One check in full.

    Args:
        run: the logs.
        check: the event.
        block: show this block only; None: all.
    """
    facts = check_facts(run, check)
    values = {name: value for name, value in facts.items() if name not in ("event", "blocks", "share")}
    sections = [
        f"check at step {check['step']:,}, {percent(facts['share'])} of the budget\n{_fields(values)}",
        *(_block(run, entry) for entry in facts["blocks"] if block is None or entry["block"] == block),
    ]
    after = [event for event in happened(run) if event["step"] == check["step"]]
    if after:
        sections.append("changes\n" + events_table(run, after))
    return "\n\n".join(sections)


def _block(run: Run, entry: Row) -> str:
    parts = [run.blocks[entry["block"]], _fields({k: v for k, v in entry.items() if k not in (*_APART, "block")})]
    load = entry.get("domain_load")
    if isinstance(load, dict) and load and all(isinstance(row, list) for row in load.values()):
        width = max(len(row) for row in load.values())
        cells = [[str(name), *(brief(x) for x in row), *["-"] * (width - len(row))] for name, row in load.items()]
        head = ["share of a source's tokens", *(f"expert {k}" for k in range(width))]
        parts.append(text_table(head, cells, left=head[:1]))
    rows = experts(entry)
    names = list(dict.fromkeys([*EXPERT_FIELDS, *(name for row in rows for name in row)]))
    if rows:
        parts.append(text_table(names, [[brief(row.get(name)) for name in names] for row in rows], left=("mode",)))
    return "\n".join(parts)


def _fields(values: dict[str, Any]) -> str:
    rows = [[name, brief(value, 4)] for name, value in values.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)
