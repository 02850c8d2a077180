"""What a run that goes on may change against its checkpoint: more steps, and with a word of permission its data."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.values import only_plausible, read_plain
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_object
from mocte_ds.training.run_config import RunConfig
from mocte_ds.training.schedule import follow_new_length

IDENTITY_FILE = "run_identity.json"
DATA_KEYS = ("data.weights", "data.manifest", "training.seed")
"""What `--allow-data-change` lets differ."""


_OF_TRANSFORMERS, _OLD_SIZES = "model.hf.", "model.style"


@dataclass(frozen=True)
class Changes:
    """How a run differs from the checkpoint that it goes on from."""

    steps: tuple[int, int] | None = None
    """Steps of the budget before and now; None: the same."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What else differs, by key: "checkpoint" and "run"."""

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that differs, for logs."""
        steps = {"training.steps": {"checkpoint": self.steps[0], "run": self.steps[1]}} if self.steps else {}
        return {**steps, **self.data}


def read_identity(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Args:
        folder: the checkpoint (one tag).

    Raises:
        CheckpointError: the file that tells is missing or damaged.
    """
    try:
        return read_object(folder / IDENTITY_FILE, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint of launch/pretrain.py: {error} Put the name of another checkpoint "
            f"into {folder.parent / 'latest'}, or start again in another --out."
        ) from error


def as_before(run: RunConfig, before: Mapping[str, Any], folder: Path) -> RunConfig:
    """A run file with what it leaves open as the checkpoint has it.

    A run of more steps keeps its warm-up, which would follow from the steps; other data do not change the tables of
    the routers, whose seed would follow from `training.seed`.

    Args:
        run: the run file.
        before: from :func:`read_identity`.
        folder: the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    training, settings = run.training, run.deepspeed
    warmup = before.get("training.warmup_steps")
    if not training.warmup_steps and _is_longer(before.get("training.steps"), training.steps) and type(warmup) is int:
        training = replace(training, warmup_steps=max(1, warmup))
    if "mocte" in settings and before.get("training.seed") != training.seed and (folder / STATE_FILE).is_file():
        with only_plausible(folder / STATE_FILE):
            seed = read_plain(folder / STATE_FILE, mmap=True)["mocte"]["config"]["seed"]
        settings = {**settings, "mocte": {"seed": seed, **settings["mocte"]}}
    return replace(run, training=training, deepspeed=settings)


def require_same_run(
    identity: Mapping[str, Any],
    folder: Path,
    defaults: Mapping[str, Any] | None = None,
    allow_data_change: bool = False,
) -> Changes:
    """Refuse to go on from a checkpoint of another run, before anything is built.

    Args:
        identity: what must not change, flat; `training.steps` may be more.
        folder: the checkpoint (one tag).
        defaults: of keys that came after the version which wrote the checkpoint.
        allow_data_change: let DATA_KEYS differ.

    Returns:
        What differs and may.

    Raises:
        CheckpointError: names every key that differs, or the file that tells is missing.
    """
    before = read_identity(folder)
    now, usual = (json.loads(json.dumps(dict(values))) for values in (identity, defaults or {}))
    before = {**{key: value for key, value in usual.items() if key in now}, **before}
    if _OLD_SIZES in before and _OLD_SIZES not in now:
        raise CheckpointError(
            f"the checkpoint {folder} is of an earlier version of mocte-ds, whose presets were models of its own and "
            "not of transformers. Finish the run with that version, or start again in another --out."
        )
    # Another version of transformers has other keys in its configs; what both have must agree.
    either = {key for key in before.keys() ^ now.keys() if key.startswith(_OF_TRANSFORMERS)}
    before, now = ({key: value for key, value in side.items() if key not in either} for side in (before, now))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    steps = None
    if "training.steps" in keys and _is_longer(before.get("training.steps"), now.get("training.steps")):
        keys.remove("training.steps")
        steps = before["training.steps"], now["training.steps"]
    data = [key for key in keys if key in DATA_KEYS and allow_data_change]
    refused = [key for key in keys if key not in data]
    if refused:
        listed = "; ".join(f"{key}: checkpoint {before.get(key)!r}, run {now.get(key)!r}" for key in refused)
        hint = " --allow-data-change lets the data and the seed differ." if set(refused) & set(DATA_KEYS) else ""
        raise CheckpointError(
            f"the checkpoint {folder} belongs to another configuration: {listed}. Use its values, or start again in "
            f"another --out.{hint}"
        )
    return Changes(steps, {key: {"checkpoint": before.get(key), "run": now.get(key)} for key in data})


def tell_changes(changes: Changes, engine: Any, position: int, event: Callable[..., None], rank: int) -> None:
    """Log what differs, with a warning for each; a run that was prolonged takes the rate of its new schedule.

    Args:
        changes: of :func:`require_same_run`.
        engine: that has loaded the checkpoint.
        position: sequences of the data that are read.
        event: logs.
        rank: of this process.
    """
    told: list[tuple[str, dict[str, Any]]] = []
    if changes.steps:
        before, after = follow_new_length(engine)
        text = (
            f"the run is prolonged from {changes.steps[0]} to {changes.steps[1]} steps: the learning rate follows the "
            f"schedule of the new length and goes from {before:.4g} to {after:.4g}; the warm-up stays as it was."
        )
        told.append(("prolong", {"steps": list(changes.steps), "lr": [before, after], "note": text}))
    if changes.data:
        listed = "; ".join(f"{key}: {v['checkpoint']!r} before, {v['run']!r} now" for key, v in changes.data.items())
        text = f"the run goes on with other data than the checkpoint's (--allow-data-change): {listed}."
        told.append(("data_change", {"changes": changes.data, "position": position, "note": text}))
    for name, facts in told:
        event(name, **facts)
        if rank == 0:
            logging.getLogger("mocte_ds").warning(facts["note"])


def changes_so_far(path: Path, step: int) -> list[dict[str, Any]]:
    """Changes that earlier resumes have written into a run.json, before a step; none where there is no such file.

    Changes at the step itself are left out: this resume detects them again.
    """
    try:
        return [entry for entry in read_object(path).get("changes", []) if entry["step"] < step]
    except (ConfigError, LookupError, TypeError):
        return []


def _is_longer(before: Any, now: Any) -> bool:
    return type(before) is int and type(now) is int and now > before
