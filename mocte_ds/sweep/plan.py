"""Sweep files: which runs are compared."""

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
"""Of a sweep: a grid's combinations grow with the product of its lists."""
# Names become folders and cells of a table.
_NAME = re.compile(r"\w[\w.,=+-]*")


@dataclass(frozen=True)
class Arm:
    """One setting that is compared."""

    name: str
    changes: dict[str, Any]
    """`section.key` of the run file to its value; a section as a value takes the place of the whole section."""
    family: str = ""
    """Name under which trials of several learning rates belong together; empty: the arm's own."""

    @property
    def of(self) -> str:
        """The name in the sweep file."""
        return self.family or self.name


@section("sweep")
class _SweepFile:
    """The file as it is written."""

    run: str = ""
    processes: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    seeds: list[Seed] = field(default_factory=lambda: [0])
    baseline: str | None = None
    learning_rates: list[Positive] = field(default_factory=list)
    set: dict[str, Plain] = field(default_factory=dict)
    arms: dict[str, Plain] = field(default_factory=dict)
    grid: dict[str, list[Plain]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    run: Path
    """The run file that all arms share."""
    processes: int
    """Ranks of a run."""
    seeds: list[int]
    """Every arm is run with each of them (`training.seed`)."""
    baseline: str | None
    """The arm that others are compared with, seed by seed; with several learning rates its best trial."""
    arms: list[Arm]
    shared: tuple[str, ...] = ()
    """Changes of all arms, `section.key=value` each; an arm's own changes come after them."""

    def runs(self) -> list[tuple[Arm, int]]:
        """All runs, seed by seed, so that a sweep that is ended early has whole seeds."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def changes(self, arm: Arm, seed: int) -> list[str]:
        """What a run changes in the run file: values of `--set` for launch/pretrain.py, the last one wins."""
        return [f"{SEED}={seed}", *self.shared, *_written(arm.changes)]

    def config(self, arm: Arm, seed: int) -> RunConfig:
        """The settings of a run.

        Raises:
            ConfigError: they are refused; names the arm.
        """
        try:
            return read_run(self.run, self.changes(arm, seed))
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}, seed {seed}: {error}") from error

    def with_shared(self, changes: Sequence[str]) -> "Sweep":
        """The same sweep with more changes of all arms.

        Raises:
            ConfigError: an arm would undo one of them.
        """
        for arm in self.arms:
            _require_kept(arm, [change.partition("=")[0] for change in changes], "--set", same=True)
        _require_no_seed([change.partition("=")[0] for change in changes], "--set", "--seeds")
        return replace(self, shared=(*self.shared, *changes))


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file.

    Keys: `run` (a run file, relative to this file), `processes`, `seeds`, `baseline` (name of an arm), `learning_rates`
    (every arm is tried with each of them), `set` (changes that all arms share), and `arms` (name to changes), `grid`
    (key to list of values: every combination is an arm), or both.

    Raises:
        ConfigError: unknown key, wrong value, no arm, two arms of one name, or a run file that is not there.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a sweep file: it must have the keys run and arms or grid.")
    try:
        file = parse_section(_SweepFile, values)
        return _checked(file, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _checked(file: _SweepFile, path: Path) -> Sweep:
    if not file.run or not is_file(path.parent / file.run):
        raise ConfigError(f"run = {shown(file.run)} is not a file beside it; name the run file that all arms share.")
    if not file.seeds or len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"seeds = {shown(file.seeds)} must be at least one number, each of them once.")
    _require_changes(file.set, "set")
    arms = _trials([*_named(file.arms), *_combinations(file.grid)], file)
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
    families = list(dict.fromkeys(arm.of for arm in arms))
    if file.baseline is not None and file.baseline not in families:
        raise ConfigError(f"baseline = {shown(file.baseline)} is not one of the arms {shown(families)}.")
    return Sweep(
        (path.parent / file.run).resolve(),
        file.processes,
        list(file.seeds),
        file.baseline,
        arms,
        tuple(_written(file.set)),
    )


def _trials(arms: list[Arm], file: _SweepFile) -> list[Arm]:
    """Every arm with each learning rate, so that all of them have equal trials."""
    if not file.learning_rates:
        return arms
    if len(set(file.learning_rates)) < len(file.learning_rates):
        raise ConfigError(f"learning_rates = {shown(file.learning_rates)} must have each number once.")
    for where, keys in [("set", list(file.set)), *((f"arms.{arm.name}", list(arm.changes)) for arm in arms)]:
        if RATE in keys:
            raise ConfigError(f"{where} has {RATE}, and every arm is tried with all learning_rates; remove one.")
    return [
        Arm(f"{arm.name},lr={rate:g}", {**arm.changes, RATE: rate}, arm.name)
        for arm in arms
        for rate in file.learning_rates
    ]


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
