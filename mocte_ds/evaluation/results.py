"""Results of lm-evaluation-harness: every metric under every filter, as plain numbers, and as a table to read."""

import numbers
from collections import Counter
from typing import Any

_NO_METRIC = ("alias", "name", "sample_len", "sample_count")
_NO_FILTER = "none"


def collect(found: dict[str, Any], chances: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """All tasks and groups of a run of lm-eval.

    Args:
        found: what its simple_evaluate returned.
        chances: what guessing gives, by task.

    Returns:
        {task: {"metric": value, "metric_stderr": ..., "items": n, "chance": ...}}. Where several filters give a metric,
        each name is followed by a comma and the filter, as lm-eval names them: "exact_match,strict-match" and
        "exact_match_stderr,strict-match".
    """
    results = {}
    for task, numbers_of in found["results"].items():
        values = {}
        filters = Counter(key.partition(",")[0] for key in numbers_of)
        for key, value in numbers_of.items():
            metric, _, kind = key.partition(",")
            if metric in _NO_METRIC or isinstance(value, bool) or not isinstance(value, numbers.Real):
                continue
            values[metric if kind in ("", _NO_FILTER) or filters[metric] == 1 else key] = (
                value if isinstance(value, int) else float(value)
            )
        counts = (found.get("n-samples") or {}).get(task, {})
        results[task] = {**values, "items": counts.get("effective"), "chance": chances.get(task)}
    return results


def table(results: dict[str, Any]) -> str:
    """The results as lines to read: task, items, metric (filter), value, standard error, chance."""
    rows = []
    for task, values in results["tasks"].items():
        items, chance = values.get("items"), values.get("chance")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if key in ("items", "chance") or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr{comma}{kind}")
            right = f"{error:>9.4f}" if isinstance(error, float) else f"{'-':>9}"
            floor = f"{chance:>8.2f}" if chance is not None else f"{'-':>8}"
            name = f"{metric} ({kind})" if kind else metric
            rows.append((task, "-" if items is None else str(items), name, f"{value:>8.4f}{right}{floor}"))
    wide = [max([least, *(len(row[i]) + 2 for row in rows)]) for i, least in ((0, 28), (2, 14))]
    lines = [f"{'task':<{wide[0]}}{'items':>6}  {'metric':<{wide[1] - 2}}{'value':>8}{'stderr':>9}{'chance':>8}"]
    lines += [f"{task:<{wide[0]}}{items:>6}  {name:<{wide[1] - 2}}{right}" for task, items, name, right in rows]
    return "\n".join(lines)
