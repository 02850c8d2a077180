"""Which tasks the names on a command line mean, where their files lie, and what guessing gives in each."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.evaluation.benchmarks.catalogue import CORE, GROUP
from mocte_ds.yaml_files import read_yaml

TASKS = Path(__file__).parent / "tasks"
_EXECUTED = ("humaneval",)
"""Tasks that run what the model has written."""


def offline_tasks() -> dict[str, dict[str, Any]]:
    """The tasks that ship with the package: name -> its YAML."""
    return {path.stem: read_yaml(path) for path in sorted(TASKS.glob("*.yaml"))}


@dataclass
class Selection:
    """What is to be run."""

    names: list[str]
    folders: list[str] = field(default_factory=list)
    """With the task files of lm-eval that are needed."""
    everything: bool = False
    """Whether all of lm-eval's task files have to be read, which takes a minute."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks of a group that do not run, and why."""


def select(tasks: Sequence[str], include_path: str | Path | None, offline: bool, run_code: bool) -> Selection:
    """Find tasks by their names.

    Args:
        tasks: names; `mocte-core` stands for :data:`CORE`.
        include_path: folder with more task files, whose names are not looked at here.
        offline: whether there are data for lm-eval's own tasks.
        run_code: whether programs that a model writes may run.

    Raises:
        ConfigError: an unknown name (names the nearest ones), or one that needs ``offline`` or ``run_code``.
    """
    names = dict.fromkeys(name for task in tasks for name in (CORE if task == GROUP else (task,)))
    known, found = offline_tasks(), Selection([])
    missing = [name for name in names if name not in known]
    if missing and not offline and include_path is None:
        near = difflib.get_close_matches(missing[0], known, n=2, cutoff=0.3)
        raise ConfigError(
            f"task '{missing[0]}' does not ship with mocte-ds; nearest: {near or 'none'}; all: {sorted(known)}. "
            "--include-path takes a folder with more lm-eval tasks, --offline one with the data of standard tasks "
            "(tools/get_benchmarks.py)."
        )
    for name in names:
        if not name.startswith(_EXECUTED) or run_code:
            found.names.append(name)
        elif name in tasks:
            raise ConfigError(f"{name} runs programs that the model has written; --run-code allows it.")
        else:
            found.left_out[name] = "it runs programs that the model has written, which --run-code allows"
    if offline:
        places = _places([name for name in found.names if name not in known])
        found.folders = sorted({str(folder) for folder in places.values() if folder is not None})
        found.everything = None in places.values()
    return found


def _places(names: Sequence[str]) -> dict[str, Path | None]:
    """The folder of lm-eval in which a task's file lies; None: unknown, or a group whose tasks lie elsewhere."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    line = re.compile(rf'^"?(task|group)"?: *"?({"|".join(map(re.escape, names))})"? *$', re.MULTILINE)
    places: dict[str, Path | None] = dict.fromkeys(names)
    if names:
        for path in sorted(root.rglob("*.yaml")):
            for kind, name in line.findall(path.read_text(encoding="utf-8", errors="replace")):
                if kind == "task" or name in CORE:
                    places[name] = places[name] or path.parent
    return places


def manager(folders: Sequence[str], everything: bool, num_fewshot: int | None) -> Any:
    """lm-eval's TaskManager for some folders of task files, which keeps what it has loaded as `.loaded`.

    Args:
        folders: of task files.
        everything: whether all of lm-eval's own are read too.
        num_fewshot: as of :func:`mocte_ds.evaluation.lm.evaluate`.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        loaded: Any = None

        def load(self, task_list: Any) -> Any:
            self.loaded = super().load(task_list)
            for name, task in self.loaded["tasks"].items():
                _require_examples(name, task, num_fewshot)
            return self.loaded

    return Manager(include_path=list(folders), include_defaults=everything)


def _require_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Refuse a task that draws more examples than there are."""
    usual = task.config.num_fewshot
    wanted = usual if num_fewshot is None or usual == 0 else num_fewshot
    sampler = getattr(task, "sampler", None)
    if wanted and sampler is not None and len(sampler.df) < wanted:
        raise ConfigError(
            f"task {name} shows {wanted} examples before a question, and {len(sampler.df)} are there: its training "
            "split is not among the data. Take --num-fewshot 0, or fill the folder from a cache that has it."
        )


@dataclass(frozen=True)
class Chance:
    """What guessing gives."""

    score: float
    """Expected share of right answers."""
    error: float
    """Standard error of that share over the items that were asked."""


def chances(loaded: Any, limit: int | None) -> dict[str, Chance]:
    """The chance levels of all multiple-choice tasks and of groups of them, from the number of choices of each item.

    A guess is right in item i with probability p_i = 1 / choices_i; the share of n right guesses has the mean of the
    p_i and the standard error sqrt(sum p_i (1 - p_i)) / n.

    Args:
        loaded: by a manager.
        limit: items of each task that were asked; None: all.
    """
    odds: dict[str, list[float]] = {}
    for name, task in loaded["tasks"].items():
        # Nothing is known of what a task scores by code of its own.
        if task.OUTPUT_TYPE == "multiple_choice" and not getattr(task.config, "process_results", None):
            asked = task.doc_iterator(rank=0, limit=limit, world_size=1)
            odds[name] = [_odds(task, document) for _, document in asked]
    for group, parts in loaded["groups"].items():
        inside = list(_tasks_in(parts))
        if inside and all(name in odds for name in inside):
            odds[group] = [p for name in inside for p in odds[name]]
    return {name: _chance(ps) for name, ps in odds.items() if ps}


def _odds(task: Any, document: Any) -> float:
    """Chance that a guess is one of the right choices."""
    right = task.doc_to_target(document)
    return (len(set(right)) if isinstance(right, list) else 1) / len(task.doc_to_choice(document))


def _tasks_in(group: Any) -> Iterable[str]:
    return [task.task_name for task in group.get_all_tasks()]


def _chance(odds: list[float]) -> Chance:
    return Chance(sum(odds) / len(odds), sum(p * (1 - p) for p in odds) ** 0.5 / len(odds))
