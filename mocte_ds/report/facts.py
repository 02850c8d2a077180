"""Find settings and versions in run.json, whose nesting belongs to the run and not to the report."""

from collections.abc import Iterator
from typing import Any

from mocte_ds.report.reader import Run


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every plain value of a nested structure with its path; lists of plain values count as one value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, str(place)))
    else:
        yield path, value


def setting(run: Run, *keys: str) -> Any:
    """The value whose path ends with ``keys``, outermost first; None if there is none.

    Example: ``setting(run, "clusters", "min_silhouette")``.
    """
    best: tuple[int, Any] | None = None
    for path, value in leaves(run.facts):
        if path[-len(keys) :] == keys and value is not None and (best is None or len(path) < best[0]):
            best = (len(path), value)
    return best[1] if best else None


def first_setting(run: Run, *names: str | tuple[str, ...]) -> Any:
    """The first of several names that run.json has."""
    for name in names:
        value = setting(run, *(name if isinstance(name, tuple) else (name,)))
        if value is not None:
            return value
    return None


def section(run: Run, name: str) -> dict[str, Any]:
    """The dictionary called ``name`` nearest to the root of run.json; empty if there is none."""
    level = [run.facts]
    while level:
        for inner in level:
            if isinstance(inner.get(name), dict):
                return inner[name]
        level = [value for inner in level for value in inner.values() if isinstance(value, dict)]
    return {}
