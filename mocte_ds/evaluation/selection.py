"""Which tasks the names on a command line mean, where their files lie, and what guessing gives in each."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.evaluation.benchmarks.catalogue import CORE, GROUP
from mocte_ds.evaluation.task_files import TASKS
from mocte_ds.yaml_files import read_yaml

_EXECUTED = ("humaneval",)
"""Tasks that run what the model has written."""
_NAMED = re.compile(r'^"?(task|group)"?: *"?([^\s"#]+)"? *$', re.MULTILINE)
_PATTERN = frozenset("*?[")


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
    shipped: bool = True
    """Whether all of them ship with mocte-ds, so that no network is needed."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks of a group that do not run, and why."""


def select(tasks: Sequence[str], include_path: str | Path | None, run_code: bool) -> Selection:
    """Find tasks by their names.

    Args:
        tasks: names, also of groups and tags, and patterns, as lm-eval has them; `mocte-core` stands for :data:`CORE`.
        include_path: folder with more task files.
        run_code: whether programs that a model writes may run.

    Raises:
        ConfigError: a name that stands in no task file (names the nearest ones), or one that needs ``run_code``.
    """
    found, known = Selection([]), offline_tasks()
    for name in dict.fromkeys(name for task in tasks for name in (CORE if task == GROUP else (task,))):
        if not name.startswith(_EXECUTED) or run_code:
            found.names.append(name)
        elif name in tasks:
            raise ConfigError(f"{name} runs programs that the model has written; --run-code allows it.")
        else:
            found.left_out[name] = "it runs programs that the model has written, which --run-code allows"
    others = [name for name in found.names if name not in known]
    found.shipped = not others
    if others:
        given = _TaskFiles([] if include_path is None else Path(include_path).rglob("*.yaml"), others)
        rest = [name for name in others if name not in given.folders]
        theirs = _TaskFiles(_of_lm_eval().rglob("*.yaml") if rest else [], rest)
        for name in rest:
            if name not in given.mentioned | theirs.mentioned and not _PATTERN & {*name}:
                raise _unknown(name, [*known, *given.names, *theirs.names])
        found.folders = sorted({str(folder) for folder in theirs.folders.values()})
        found.everything = any(name not in theirs.folders for name in rest)
    return found


class _TaskFiles:
    """What the text of some task files tells of some names, without lm-eval's reading of all of them."""

    def __init__(self, paths: Iterable[Path], names: Sequence[str]) -> None:
        self.folders: dict[str, Path] = {}
        """Of the tasks whose files these are; a group's tasks may lie elsewhere, but for those of :data:`CORE`."""
        self.mentioned: set[str] = set()
        self.names: set[str] = set()
        """All tasks and groups."""
        for path in sorted(paths):
            text = path.read_text(encoding="utf-8", errors="replace")
            self.mentioned.update(name for name in names if name in text)
            for kind, name in _NAMED.findall(text):
                self.names.add(name)
                if name in names and (kind == "task" or name in CORE):
                    self.folders.setdefault(name, path.parent)


def _of_lm_eval() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lm_eval is not installed", name="lm_eval")
    return Path(spec.origin).parent / "tasks"


def _unknown(name: str, names: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, sorted({*names}), n=3, cutoff=0.5)
    return ConfigError(
        f"there is no task '{name}' in mocte-ds, in lm-eval or in --include-path; nearest: {near or 'none'}; these "
        f"ship with mocte-ds: {sorted(offline_tasks())}."
    )


def matching(names: Iterable[str], tasks_of: Any) -> list[str]:
    """Names of tasks, groups and tags, with those that fit a pattern in its place.

    Args:
        names: and patterns.
        tasks_of: made by :func:`manager`.

    Raises:
        ConfigError: there is none; names the nearest ones.
    """
    found: list[str] = []
    for name in names:
        fitting = [name] if name in tasks_of.all_tasks else tasks_of.match_tasks([name])
        if not fitting:
            raise _unknown(name, tasks_of.all_tasks)
        found += fitting
    return list(dict.fromkeys(found))


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
