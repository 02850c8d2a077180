"""Loading: which checkpoint is the last good one, does it belong to this run, and its parts on this rank."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocte_ds.checkpoints.save import FORMAT, RANDOM_FILE, STATE_FILE
from mocte_ds.config import MocteConfig
from mocte_ds.dist.collectives import world
from mocte_ds.errors import CheckpointError

# What decides which tensors a checkpoint holds; thresholds and cadence may change between two runs.
_STRUCTURE = ("num_experts", "ep_size", "expert", "router", "banks", "spectrum.rank", "freeze.prefix.layers")


def resolve_tag(load_dir: str | Path) -> str | None:
    """Tag of the last good checkpoint, None where there is none.

    Raises:
        CheckpointError: `latest` is damaged or names a folder that does not exist.
    """
    latest = Path(load_dir) / "latest"
    if not latest.is_file():
        return None
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest} cannot be read: {error}; write the name of a checkpoint into it.") from error
    # An empty name would be the folder itself, and the run would start anew as if there were no checkpoint.
    if not tag or not (Path(load_dir) / tag).is_dir():
        raise CheckpointError(f"{latest} names the checkpoint '{tag}', which is not there; write another tag into it.")
    return tag


def read_plain(path: Path) -> Any:
    """Read a file of ours without executing anything in it.

    Raises:
        CheckpointError: the file is missing, damaged or holds more than plain values and tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete or not one of mocte_ds.") from error
    except Exception as error:  # torch.load raises many types for a damaged file
        text = str(error).strip().splitlines() or ["damaged"]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {text[0]}") from error


def require_keys(values: Any, keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    """``values``, if it is a dict with these keys.

    Raises:
        CheckpointError: it is not; names the file.
    """
    missing = [key for key in keys if key not in values] if isinstance(values, dict) else ["keys"]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}: it is no file of a checkpoint of mocte_ds.")
    return values


def read_state(load_dir: str | Path, tag: str, config: MocteConfig | None, names: list[str] | None) -> dict[str, Any]:
    """Our part of a checkpoint, after checking that it fits.

    Args:
        load_dir: folder of all checkpoints.
        tag: the checkpoint.
        config: the run's "mocte" block; None: take any.
        names: the model's blocks; None: take any.

    Raises:
        CheckpointError: damaged, of another format, or of another configuration; names every key that differs.
    """
    path = Path(load_dir) / tag / STATE_FILE
    state = require_keys(read_plain(path), ("format",), path)
    if state["format"] != FORMAT:
        raise CheckpointError(f"{load_dir}/{tag} has format {state['format']}; this version reads format {FORMAT}.")
    require_keys(state, ("mocte", "client_state"), path)
    require_keys(state["mocte"], ("config", "blocks", "tokens"), path)
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


def restore_random_states(load_dir: str | Path, tag: str) -> dict[str, Any] | None:
    """Put this rank's random number generators where they were; ranks that did not exist keep their own.

    Returns:
        What else the file holds of this rank's controller; None where there is nothing.
    """
    path = Path(load_dir) / tag / RANDOM_FILE.format(rank=world()[0])
    if not path.exists():
        return None
    states = require_keys(read_plain(path), ("python", "numpy", "torch"), path)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return states.get("mocte")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
