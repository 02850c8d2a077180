"""Random number generators in a checkpoint: a resumed run draws what the uninterrupted one would have drawn."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocte_ds.checkpoints.plain import read_plain, require_keys
from mocte_ds.dist.collectives import world

RANDOM_FILE = "mocte_random_rank{rank}.pt"


def random_states() -> dict[str, Any]:
    """States of this rank's random number generators, in plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    numbers = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    states = {
        "python": [version, list(internal), gauss],
        "numpy": [name, numbers, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(load_dir: str | Path, tag: str) -> dict[str, Any] | None:
    """Put this rank's random number generators where they were; ranks that did not exist keep their own.

    Returns:
        What else the file holds of this rank's controller; None where there is nothing.

    Raises:
        CheckpointError: the file is damaged.
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
