"""Results of lm-evaluation-harness: every metric under every filter, what guessing gives, and a table to read."""

import numbers
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mocte_ds.evaluation.selection import Chance

NOISE = 1.96
"""Standard errors around chance within which a score shows nothing: 95 % of pure guesses fall there."""
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")
_NO_FILTER = "none"
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics that are the share of right choices."""
_FACTS = ("items", "chance", "chance_stderr", "at_chance", "part_of")
_MOST_PARTS = 10
"""Of a group, in the table."""


def collect(found: dict[str, Any], chances: Mapping[str, Chance]) -> dict[str, dict[str, Any]]:
    """All tasks and groups of a run of lm-eval.

    Args:
        found: what its simple_evaluate returned.
        chances: what guessing gives, by task and group.

    Returns:
        {task: {"metric": value, "metric_stderr": ..., "items": n, "chance": ..., "chance_stderr": binomial standard
        error of guessing, "at_chance": names of the metrics that are within NOISE of these of chance}}. Where several
        filters give a metric, each name is followed by a comma and the filter, as lm-eval names them:
        "exact_match,strict-match" and "exact_match_stderr,strict-match".
    """
    results = {}
    samples = found.get("n-samples") or {}
    for task, numbers_of in found["results"].items():
        values: dict[str, Any] = {}
        filters = Counter(key.partition(",")[0] for key in numbers_of)
        for key, value in numbers_of.items():
            metric, _, kind = key.partition(",")
            if metric in _NO_METRIC or isinstance(value, bool) or not isinstance(value, numbers.Real):
                continue
            values[metric if kind in ("", _NO_FILTER) or filters[metric] == 1 else key] = (
                value if isinstance(value, int) else float(value)
            )
        items = samples.get(task, {}).get("effective")
        if items is None and task in (found.get("groups") or {}):
            items = numbers_of.get("sample_len")
        results[task] = {**values, "items": items, **_against(values, chances.get(task))}
    for group, parts in (found.get("group_subtasks") or {}).items():
        for part in parts:
            if part in results and part != group:
                results[part]["part_of"] = group
    return results


def _against(values: dict[str, Any], chance: Chance | None) -> dict[str, Any]:
    if chance is None:
        return {"chance": None}
    near = [
        key
        for key, value in values.items()
        if key.partition(",")[0] in _SHARES and abs(value - chance.score) <= NOISE * chance.error
    ]
    return {"chance": chance.score, "chance_stderr": chance.error, "at_chance": near}


def table(results: dict[str, Any]) -> str:
    """The results as lines to read: task, items, metric (filter), value, standard error, chance; then notes."""
    rows, some_at_chance = [], False
    parts = Counter(values["part_of"] for values in results["tasks"].values() if "part_of" in values)
    hidden = sum(count for count in parts.values() if count > _MOST_PARTS)
    for task, values in results["tasks"].items():
        if parts[values.get("part_of")] > _MOST_PARTS:
            continue
        items, chance = values.get("items"), values.get("chance")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if key in _FACTS or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr{comma}{kind}")
            right = f"{_digits(error):>9}" if isinstance(error, float) else f"{'-':>9}"
            guessed = chance is not None and metric in _SHARES
            floor = f"{chance:>8.2f}" if guessed else f"{'-':>8}"
            near = key in values.get("at_chance", ())
            some_at_chance |= near
            name = f"{metric} ({kind})" if kind else metric
            mark = "  ~ chance" if near else ""
            rows.append((task, "-" if items is None else str(items), name, f"{_digits(value):>8}{right}{floor}{mark}"))
    wide = [max([least, *(len(row[i]) + 2 for row in rows)]) for i, least in ((0, 28), (2, 14))]
    lines = [f"{'task':<{wide[0]}}{'items':>6}  {'metric':<{wide[1] - 2}}{'value':>8}{'stderr':>9}{'chance':>8}"]
    lines += [f"{task:<{wide[0]}}{items:>6}  {name:<{wide[1] - 2}}{right}" for task, items, name, right in rows]
    if some_at_chance:
        lines.append(
            f"~ chance: within {NOISE} binomial standard errors of what guessing gives; such scores show nothing"
        )
    if hidden:
        lines.append(f"{hidden} parts of groups are left out here; --json and --output have them")
    return "\n".join([*lines, *results.get("notes", [])])


def _digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"
