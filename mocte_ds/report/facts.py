"""Look up settings and versions in run.json, as the training loop writes it."""

from typing import Any

from mocte_ds.logs import LOGGED_BY
from mocte_ds.report.run import Run

MOCTE = ("deepspeed", "mocte")
"""Where run.json keeps the "mocte" block with all its defaults filled in."""


def fact(run: Run, *path: str) -> Any:
    """The value at a path of run.json, outermost key first; None if there is none."""
    value: Any = run.facts
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def budget(run: Run) -> int | None:
    """Optimizer steps that the run is meant to take, or None if run.json does not say."""
    value = fact(run, "training", "steps")
    return value if isinstance(value, int) and value > 0 else None


def is_of_script(run: Run) -> bool:
    """Whether a script of a user's own has logged the run: nobody has told the log of FLOPs."""
    return fact(run, "logged_by") == LOGGED_BY


def is_dense(run: Run) -> bool:
    """Whether run.json says that the run has no MO-CTE."""
    return bool(run.facts) and not run.blocks and fact(run, *MOCTE) is None
