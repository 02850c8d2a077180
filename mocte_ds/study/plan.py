"""Study files: which runs are compared, and which of them tune the learning rate."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mocte_ds.errors import ConfigError
from mocte_ds.paths import is_file
from mocte_ds.sections import Plain, Positive, Seed, parse_section, section
from mocte_ds.shown import name_shown, shown
from mocte_ds.training.run_config import RunConfig, read_run
from mocte_ds.yaml_files import read_yaml

SEED, RATE = "training.seed", "training.learning_rate"
MOST_RANKS = 1 << 16
MOST_ARMS = 10_000
"""Of a study: a grid's combinations grow with the product of its lists."""
# Names become folders and cells of a table.
_NAME = re.compile(r"\w[\w.,=+-]*")


@dataclass(frozen=True)
class Arm:
    """One setting that is compared."""

    name: str
    changes: dict[str, Any]
    """`section.key` of the run file to its value; a section as a value takes the place of the whole section."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    arm: Arm
    seed: int
    rate: float | None = None
    """Learning rate; None: the run file's."""
    budget: float = 1.0
    """Steps, as a multiple of those of the run file; warm-up, validations and checkpoints go along."""
    trial: bool = False
    """Whether it only serves to choose the learning rate."""

    @property
    def name(self) -> str:
        """Of its folder."""
        rate = f",lr={self.rate:g}" if self.rate is not None else ""
        budget = f",x{self.budget:g}" if self.budget != 1 and not self.trial else ""
        return f"{'trial-' if self.trial else ''}{self.arm.name}{rate}{budget}-seed{self.seed}"


@section("study")
class _StudyFile:
    """The file as it is written."""

    run: str = ""
    processes: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    seeds: list[Seed] = field(default_factory=lambda: [0])
    baseline: str | None = None
    learning_rates: list[Positive] = field(default_factory=list)
    trial_budget: Annotated[float, Field(gt=0, lt=1)] = 0.2
    longer: list[Annotated[float, Field(gt=0, le=100)]] = field(default_factory=list)
    set: dict[str, Plain] = field(default_factory=dict)
    arms: dict[str, Plain] = field(default_factory=dict)
    grid: dict[str, list[Plain]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    run: Path
    """The run file that all arms share."""
    processes: int
    """Ranks of a run."""
    seeds: list[int]
    """Every arm is run with each of them (`training.seed`)."""
    baseline: str | None
    """The arm that others are compared with, seed by seed."""
    arms: list[Arm]
    shared: tuple[str, ...] = ()
    """Changes of all arms, `section.key=value` each; an arm's own changes come after them."""
    rates: tuple[float, ...] = ()
    """Learning rates that every arm is tried with; none: the run file's."""
    trial_budget: float = 0.2
    """Steps of a trial, as a share of the run file's."""
    longer: tuple[float, ...] = ()
    """Other budgets of the baseline, each with a schedule of its own."""
    trial_seed: int = 0
    """Seed of the trials."""

    def trials(self) -> list[PlannedRun]:
        """Runs that choose the learning rates, with the file's first seed: the same number for every arm."""
        return [
            PlannedRun(arm, self.trial_seed, rate, self.trial_budget, trial=True)
            for arm in self.arms
            for rate in self.rates
        ]

    def runs(self, rates: Mapping[str, float | None]) -> list[PlannedRun]:
        """Runs that are compared, seed by seed, so that a study that is ended early has complete seeds.

        Args:
            rates: learning rate of each arm; arms that are missing have no run.
        """
        found = []
        for seed in self.seeds:
            for arm in self.arms:
                if arm.name in rates:
                    budgets = (1.0, *(self.longer if arm.name == self.baseline else ()))
                    found += [PlannedRun(arm, seed, rates[arm.name], budget) for budget in budgets]
        return found

    def changes(self, run: PlannedRun) -> list[str]:
        """What a run changes in the run file: values of `--set` for launch/pretrain.py, the last one wins."""
        changes = [f"{SEED}={run.seed}", *self.shared, *_written(run.arm.changes)]
        if run.rate is not None:
            changes.append(f"{RATE}={run.rate:g}")
        if run.budget != 1:
            config = self._read(run, changes)
            if config.deepspeed.get("scheduler") or (config.deepspeed.get("mocte") or {}).get("apply_after", 1) != 1:
                raise ConfigError(
                    f"arm {run.arm.name}: deepspeed.scheduler and mocte.apply_after count steps, which a run of "
                    "another length would keep; leave them out, or learning_rates and longer."
                )
            training, every = config.training, config.evaluation.every
            changes.append(f"training.steps={_scaled(training.steps, run.budget)}")
            for key, count in (
                ("training.warmup_steps", training.warmup_steps),
                ("training.checkpoint_every", training.checkpoint_every),
                ("evaluation.every", every),
            ):
                if count:  # 0 means a share of the steps, or never
                    changes.append(f"{key}={_scaled(count, run.budget)}")
        return changes

    def config(self, run: PlannedRun) -> RunConfig:
        """The settings of a run.

        Raises:
            ConfigError: they are refused; names the arm.
        """
        return self._read(run, self.changes(run))

    def _read(self, run: PlannedRun, changes: list[str]) -> RunConfig:
        try:
            return read_run(self.run, changes)
        except ConfigError as error:
            raise ConfigError(f"arm {run.arm.name}, seed {run.seed}: {error}") from error

    def with_shared(self, changes: Sequence[str]) -> "Study":
        """The same study with more changes of all arms.

        Raises:
            ConfigError: an arm would undo one of them.
        """
        keys = [change.partition("=")[0] for change in changes]
        for arm in self.arms:
            _require_kept(arm, keys, "--set", same=True)
        _require_no_seed(keys, "--set", "--seeds")
        if self.rates and RATE in keys:
            raise ConfigError(f"--set has {RATE}, and every arm is tried with all learning_rates of the study file.")
        return replace(self, shared=(*self.shared, *changes))


def _scaled(count: int, budget: float) -> int:
    return max(1, round(count * budget))


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Keys: `run` (a run file, relative to this file), `processes`, `seeds`, `baseline` (name of an arm), `learning_rates`
    (every arm is tried with each of them for `trial_budget` of the steps, and the best one is taken), `longer` (other
    budgets of the baseline, as multiples), `set` (changes that all arms share), and `arms` (name to changes), `grid`
    (key to list of values: every combination is an arm), or both.

    Raises:
        ConfigError: unknown key, wrong value, no arm, two arms of one name, or a run file that is not there.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a study file: it must have the keys run and arms or grid.")
    try:
        file = parse_section(_StudyFile, values)
        return _checked(file, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _checked(file: _StudyFile, path: Path) -> Study:
    if not file.run or not is_file(path.parent / file.run):
        raise ConfigError(f"run = {shown(file.run)} is not a file beside it; name the run file that all arms share.")
    if not file.seeds or len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"seeds = {shown(file.seeds)} must be at least one number, each of them once.")
    _require_changes(file.set, "set")
    arms = [*_named(file.arms), *_combinations(file.grid)]
    _require_rates(arms, file)
    names = [arm.name for arm in arms]
    if not arms:
        raise ConfigError("there is no arm; give arms, a grid, or both.")
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"the arm's name {shown(name)} becomes a folder: letters, digits and . , = + - _ only. Settings of a "
                "grid whose values give no such name can be arms with names of your own."
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"there are {names.count(name)} arms with the name {name!r}; give each a name of its own."
            )
    for arm in arms:
        _require_kept(arm, list(file.set), "set", same=False)
    if file.baseline is not None and file.baseline not in names:
        raise ConfigError(f"baseline = {shown(file.baseline)} is not one of the arms {shown(names)}.")
    if file.longer and (file.baseline is None or 1 in file.longer or len(set(file.longer)) < len(file.longer)):
        raise ConfigError(
            f"longer = {shown(file.longer)} must be other budgets of the baseline, each of them once; 1 is run anyway."
        )
    return Study(
        (path.parent / file.run).resolve(),
        file.processes,
        list(file.seeds),
        file.baseline,
        arms,
        tuple(_written(file.set)),
        tuple(sorted(file.learning_rates)),
        file.trial_budget,
        tuple(sorted(file.longer)),
        file.seeds[0],
    )


def _require_rates(arms: list[Arm], file: _StudyFile) -> None:
    """Refuse learning rates that say nothing."""
    if len(set(file.learning_rates)) < len(file.learning_rates):
        raise ConfigError(f"learning_rates = {shown(file.learning_rates)} must have each number once.")
    for where, keys in [("set", list(file.set)), *((f"arms.{arm.name}", list(arm.changes)) for arm in arms)]:
        if file.learning_rates and RATE in keys:
            raise ConfigError(f"{where} has {RATE}, and every arm is tried with all learning_rates; remove one.")


def _named(arms: Mapping[Any, Any]) -> list[Arm]:
    found = []
    for name, changes in arms.items():
        if not isinstance(changes, dict | None):
            raise ConfigError(
                f"arms.{name_shown(name)} = {shown(changes)} must be a section of changes, e.g. training.steps: 100."
            )
        _require_changes(changes or {}, f"arms.{name_shown(name)}")
        found.append(Arm(str(name), changes or {}))
    return found


def _combinations(grid: Mapping[str, list[Any]]) -> list[Arm]:
    _require_changes(grid, "grid")
    empty = [key for key, values in grid.items() if not values]
    if empty:
        raise ConfigError(f"grid.{empty[0]} has no values.")
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_ARMS:
        raise ConfigError(f"grid has {count:,} combinations, and {MOST_ARMS:,} are the most; shorten its lists.")
    found = []
    for combination in itertools.product(*grid.values()) if grid else ():
        changes = dict(zip(grid, combination, strict=True))
        words = [f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in changes.items()]
        found.append(Arm(",".join(words), changes))
    return found


def _require_changes(changes: Mapping[Any, Any], where: str) -> None:
    for key in changes:
        if not isinstance(key, str) or "." not in key.strip("."):
            raise ConfigError(f"{where}: {shown(key)} must be section.key of the run file, e.g. training.steps: 100.")
    _require_no_seed(list(changes), where, "seeds")


def _require_no_seed(keys: Sequence[str], where: str, instead: str) -> None:
    if SEED in keys:
        raise ConfigError(f"{where}: every arm is run with every seed; use {instead} in place of {SEED}.")


def _require_kept(arm: Arm, shared: Sequence[str], where: str, same: bool) -> None:
    """Refuse a change of all arms that one arm would undo in silence; null (no such section) is meant to."""
    for own, value in arm.changes.items():
        for key in shared:
            if (key.startswith(f"{own}.") and value is not None) or (same and key == own):
                raise ConfigError(
                    f"{where} has {key}, but arm {arm.name} has its own {own} = {json.dumps(value)}, which takes its "
                    "place; change it in the arm."
                )


def _written(changes: Mapping[str, Any]) -> list[str]:
    # JSON is YAML too, and one line of it.
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
