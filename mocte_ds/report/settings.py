"""The settings of runs, flat, and where those of several runs differ."""

from collections.abc import Mapping
from typing import Any

from mocte_ds.report.run import Run

_WEIGHTS = "data.weights"  # its keys are names of domains
_OF_A_START = ("command", "changes", "logged_by")
"""What tells of a start and not of a run's settings."""


def differing(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all runs: values by key, and by the names of the runs that have the key.

    Args:
        runs: by name; a run without run.json has no settings, and no part in this.
    """
    found = {name: flat(run.facts) for name, run in runs.items() if run.facts}
    keys = sorted({key for values in found.values() for key in values if key.split(".")[0] not in _OF_A_START})
    missing = object()
    rows = {}
    for key in keys:
        values = [own.get(key, missing) for own in found.values()]
        if any(value != values[0] for value in values):
            rows[key] = {name: own[key] for name, own in found.items() if key in own}
    return rows


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested sections and of lists of sections."""
    if isinstance(values, list) and values and all(isinstance(entry, dict) for entry in values):
        values = {**{str(number): entry for number, entry in enumerate(values)}, "count": len(values)}
    if not isinstance(values, dict) or name == _WEIGHTS:
        return {name: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{name}.{key}" if name else str(key)))
    return found
