"""Random number generators in a checkpoint: a resumed run draws what the uninterrupted one would have drawn."""

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocte_ds.checkpoints.values import only_plausible, read_plain, require_keys

RANDOM_FILE = "mocte_random_rank{rank}.pt"
RANDOM_NAME = re.compile(r"mocte_random_rank(\d+)\.pt")


def random_states() -> dict[str, Any]:
    """States of this rank's random number generators, in plain values and tensors."""
    states = generator_states(random, np.random, torch.default_generator)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def generator_states(python: Any, numpy: Any, torchs: torch.Generator) -> dict[str, Any]:
    """States of three generators, in plain values and tensors.

    Args:
        python: random.Random, or the module.
        numpy: numpy's RandomState, or the module.
        torchs: on the CPU.
    """
    name, keys, position, has_gauss, cached = numpy.get_state(legacy=True)
    version, internal, gauss = python.getstate()
    numbers = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, numbers, int(position), int(has_gauss), float(cached)],
        "torch": torchs.get_state(),
    }


def restore_random_states(
    load_dir: str | Path, tag: str, rank: int, read: Callable[[Path], Any] = read_plain
) -> dict[str, Any] | None:
    """Put this rank's random number generators where they were.

    Args:
        load_dir: folder of all checkpoints.
        tag: the checkpoint.
        rank: of this process among all.
        read: gives the content of one of its files.

    Returns:
        What else the file holds of this rank's controller; None where there is nothing.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(load_dir) / tag / RANDOM_FILE.format(rank=rank)
    states = require_keys(read(path), ("python", "numpy", "torch"), path)
    with only_plausible(path):
        put_back(states)
    return states.get("mocte")


def put_back(states: Mapping[str, Any]) -> None:
    """Put this rank's random number generators where they were at :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Draws:
    """What some passes draw from this rank's generators, so that it can be undone; what is drawn in between stays."""

    def __init__(self) -> None:
        """Nothing is drawn yet."""
        self._before: dict[str, Any] = {}
        """State of each generator before the passes since somebody else has drawn from it."""
        self._after: dict[str, Any] = {}
        """Where the last pass has left it."""

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """Context manager: what is drawn in it is a pass's."""
        self._before = self._undone()
        try:
            yield
        finally:
            self._after = random_states()

    def undo(self) -> None:
        """Put each generator where it was before the passes, back to the last draw of somebody else.

        What passes have drawn before that one stays drawn: otherwise the other one would draw the same again.
        """
        put_back(self._undone())

    def _undone(self) -> dict[str, Any]:
        now, after = random_states(), self._after
        return {
            name: self._before[name] if name in after and _equal(after[name], state) else state
            for name, state in now.items()
        }


def _equal(one: Any, other: Any) -> bool:
    """Whether two states of a generator are the same."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))
