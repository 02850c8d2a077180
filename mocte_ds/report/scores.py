"""The results of an evaluation: one row a task and metric."""

from dataclasses import dataclass
from typing import Any

from mocte_ds.report.run import Run


@dataclass(frozen=True)
class Score:
    """One number of one task."""

    task: str
    metric: str
    value: float
    error: float | None
    """Standard error, None where the task has none."""
    chance: float | None
    """What guessing gives, None where unknown."""
    chance_error: float | None
    """Standard error of what guessing gives, None where unknown."""
    items: int | None

    @property
    def above_chance(self) -> bool | None:
        """Whether the value is more than two standard errors over chance; None where that cannot be said."""
        error = self.error if self.chance_error is None else self.chance_error
        return None if self.chance is None or error is None else self.value > self.chance + 2 * error

    @property
    def below_chance(self) -> bool:
        """Whether the value is more than two standard errors under chance."""
        error = self.error if self.chance_error is None else self.chance_error
        return self.chance is not None and error is not None and self.value < self.chance - 2 * error


def scores(run: Run) -> list[Score]:
    """Scores of evaluation/results.json, as tools/evaluate.py or lm-eval itself writes it; empty without any."""
    tasks = run.evaluation.get("tasks") or run.evaluation.get("results")
    found = []
    for task, numbers in tasks.items() if isinstance(tasks, dict) else ():
        for key, value in numbers.items() if isinstance(numbers, dict) else ():
            # lm-eval itself writes "acc,none"; tools/evaluate.py writes "acc".
            metric, comma, kind = key.partition(",")
            if not _is_number(value) or metric.endswith("_stderr") or metric in ("items", "chance", "sample_len"):
                continue
            error = numbers.get(f"{metric}_stderr{comma}{kind}")
            chance, chance_error = numbers.get("chance"), numbers.get("chance_stderr")
            found.append(
                Score(
                    task=task,
                    metric=metric if kind in ("", "none") else f"{metric} ({kind})",
                    value=value,
                    error=error if _is_number(error) else None,
                    chance=chance if _is_number(chance) else None,
                    chance_error=chance_error if _is_number(chance_error) else None,
                    items=_items(run, task, numbers),
                )
            )
    return found


def _items(run: Run, task: str, numbers: dict[str, Any]) -> int | None:
    counted = (run.evaluation.get("n-samples") or {}).get(task) or {}
    items: Any = numbers.get("items", counted.get("effective"))
    return int(items) if _is_number(items) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
