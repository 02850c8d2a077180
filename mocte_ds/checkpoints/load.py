"""Loading: our own part of a checkpoint, if it belongs to this run's configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.values import read_plain, require_keys
from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.shown import shown

STATE_FILE = "mocte_state.pt"
# What decides which tensors a checkpoint holds; thresholds and cadence may change between two runs.
_STRUCTURE = ("num_experts", "ep_size", "expert", "router", "banks", "spectrum.rank", "freeze.prefix.layers")


def read_state(
    load_dir: str | Path,
    tag: str,
    config: MocteConfig | None,
    names: list[str] | None,
    read: Callable[[Path], Any] = read_plain,
) -> dict[str, Any]:
    """Our part of a checkpoint, after checking that it fits.

    Args:
        load_dir: folder of all checkpoints.
        tag: the checkpoint.
        config: the run's "mocte" block; None: take any.
        names: the model's blocks; None: take any.
        read: gives the content of one of its files.

    Raises:
        CheckpointError: damaged, or of another configuration; names every key that differs.
    """
    path = Path(load_dir) / tag / STATE_FILE
    state = require_keys(read(path), ("mocte", "client_state"), path)
    mocte = require_keys(state["mocte"], ("config", "blocks", "tokens"), path)
    state["skipped"] = skipped_steps(state.get("skipped", []), path)  # older versions skip nothing
    state["mocte"] = {**mocte, "config": _completed(mocte["config"], path)}
    if config is not None:
        saved, now = _flat(state["mocte"]["config"]), _flat(config.to_dict())
        differing = [key for key in now if key.startswith(_STRUCTURE) and saved.get(key) != now[key]]
        if differing:
            list_of = "; ".join(f"mocte.{key}: checkpoint {saved.get(key)!r}, run {now[key]!r}" for key in differing)
            raise CheckpointError(f"the checkpoint {load_dir}/{tag} belongs to another configuration: {list_of}.")
    if names is not None:
        saved_names = [block["name"] for block in state["mocte"]["blocks"]]
        if saved_names != names:
            raise CheckpointError(
                f"the checkpoint {load_dir}/{tag} has the blocks {saved_names}, the model has {names}; use its config."
            )
    return state


def skipped_steps(value: Any, path: Path) -> list[dict[str, Any]]:
    """The events of skipped steps that a checkpoint holds (see mocte_ds.skips), if they are such.

    Args:
        value: as it was read.
        path: of the file or the checkpoint that has it.

    Raises:
        CheckpointError: they are not.
    """
    if not (isinstance(value, list) and all(isinstance(facts, dict) and _is_event(facts) for facts in value)):
        raise CheckpointError(f"{path} holds skipped steps that no version of mocte_ds writes: {shown(value)}.")
    return value


def _is_event(facts: dict[Any, Any]) -> bool:
    def all_are(kind: type, name: str, count: int | None = None) -> bool:
        values = facts.get(name)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            return False
        return count is None or len(values) == count

    kinds = {"event": str, "step": int, "what": str}
    return (
        all(isinstance(key, str) for key in facts)
        and all(isinstance(facts.get(key), kind) for key, kind in kinds.items())
        and all_are(int, "ranks")
        and all_are(str, "domains")
        and ("sequences" not in facts or all_are(int, "sequences", 2))
    )


def _completed(values: Any, path: Path) -> dict[str, Any]:
    """A stored "mocte" block with the defaults of keys that came after the version which wrote it.

    Raises:
        CheckpointError: it has keys or values that this version does not know.
    """
    try:
        return MocteConfig.from_dict(values).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"{path} was written by another version of mocte_ds: {error}") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
