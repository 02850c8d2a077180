"""Read the results of lm-eval: one row a task and metric."""

from dataclasses import dataclass
from typing import Any

from mocte_ds.report.reader import Run


@dataclass(frozen=True)
class Score:
    """One number of one task."""

    task: str
    metric: str
    value: float
    error: float | None
    """Standard error, None where lm-eval has none."""
    samples: int | None


def scores(run: Run) -> list[Score]:
    """Scores of evaluation/results.json in lm-eval's form; empty without an evaluation."""
    results = run.evaluation.get("results")
    if not isinstance(results, dict):
        return []
    found = []
    for task, numbers in results.items():
        if not isinstance(numbers, dict):
            continue
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not _is_number(value) or metric.endswith("_stderr") or metric in ("sample_len", "samples"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}" if kind else f"{metric}_stderr")
            name = metric if kind in ("", "none") else f"{metric} ({kind})"
            found.append(Score(task, name, value, error if _is_number(error) else None, _samples(run, task, numbers)))
    return found


def _samples(run: Run, task: str, numbers: dict[str, Any]) -> int | None:
    counted = (run.evaluation.get("n-samples") or {}).get(task)
    if isinstance(counted, dict):
        counted = counted.get("effective") or counted.get("original")
    counted = counted if _is_number(counted) else numbers.get("sample_len", numbers.get("samples"))
    return int(counted) if _is_number(counted) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
