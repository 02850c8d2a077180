"""A checkpoint as the ranks of another layout would have written it, read or written file by file."""

import functools
import hashlib
import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mocte_ds.checkpoints.disk_tensors import FileCopy, TensorFile, filled, read_disk_tensors
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import EXPERT_FILE, EXPERT_PARAMETER, MODEL_FILE, OPTIMIZER_NAME, renumbered
from mocte_ds.checkpoints.random_states import RANDOM_FILE, RANDOM_NAME, generator_states
from mocte_ds.checkpoints.reshaping.optimizer import CheckpointOptimizer
from mocte_ds.checkpoints.reshaping.rank_layout import RankLayout
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.checkpoints.reshaping.shards import Key
from mocte_ds.checkpoints.values import read_plain
from mocte_ds.errors import CheckpointError

_MOST_RANKS = 1 << 16  # more than anybody has; each of them gets files
_MOST_SHOWN = 1024


class Reshaped:
    """What the files of a checkpoint are in a layout; the checkpoint itself is only read."""

    def __init__(self, written: SavedCheckpoint, layout: RankLayout, rank: int = 0) -> None:
        """Choose a layout.

        Args:
            written: the checkpoint.
            layout: may be its own one.
            rank: whose view of the shared files it is.

        Raises:
            CheckpointError: the layout does not divide the experts or the ranks, or the checkpoint is of an
                architecture that is not supported.
        """
        self.written, self.layout, self.rank = written, layout, rank
        self.changed = not written.layout.same_as(layout)
        """Whether it is another layout than the checkpoint's."""
        if self.changed:
            written.require_supported()
            require_divisible(layout, written.num_experts)
            if written.precision is not None:
                self._optimizer  # noqa: B018  what contradicts itself is refused here, before anything is loaded

    def note(self, batch: int) -> str | None:
        """What a log should say of it; None where nothing changes.

        Args:
            batch: sequences of a global batch of the run that goes on.
        """
        written = self.written
        if not self.changed:
            return None
        other = written.batch is not None and written.batch != batch
        batches = f" Its global batch was {written.batch} sequences, the run's is {batch}." if other else ""
        left = (
            " It holds a check that has measured and not decided, which is left out: the next one decides."
            if written.has_open_check
            else ""
        )
        return (
            f"the checkpoint {written.folder} was written by {written.layout}; it is brought to {self.layout}."
            f"{left}{batches}"
        )

    def names(self) -> list[str]:
        """All files of the layout."""
        ranks = range(self.layout.world_size)
        of_ranks = [RANDOM_FILE.format(rank=rank) for rank in ranks]
        if self.written.precision is not None:
            of_ranks += [self.written.optimizer_file(rank) for rank in ranks]
        kinds = (RANDOM_NAME, OPTIMIZER_NAME)
        shared = [name for name in self.written.manifest.files if not any(kind.fullmatch(name) for kind in kinds)]
        return sorted(of_ranks + shared)

    def file(self, name: str) -> TensorFile | FileCopy:
        """A file of the layout, ready to be written; no weight is read yet.

        Raises:
            CheckpointError: what it is made of is damaged or contradicts itself.
        """
        content = self._content(name) if self.changed else None
        return FileCopy(self.written.folder / name) if content is None else TensorFile(content)

    def read(self, name: str) -> Any:
        """The content of a file of the layout, in CPU memory.

        Raises:
            CheckpointError: what it is made of is damaged or contradicts itself.
        """
        content = self._content(name) if self.changed else None
        if content is not None:
            return filled(content)
        plain = read_plain(self.written.folder / name)
        if name == MODEL_FILE and self.rank and self.written.state is not None and plain.get("lr_scheduler"):
            plain["lr_scheduler"] = self._schedule(plain["lr_scheduler"])
        return plain

    @functools.cached_property
    def _optimizer(self) -> CheckpointOptimizer:
        return CheckpointOptimizer(self.written)

    def _content(self, name: str) -> Any:
        """The new content of a file that the layout changes; None for one that stays as it is."""
        random_file, shard = RANDOM_NAME.fullmatch(name), OPTIMIZER_NAME.fullmatch(name)
        if random_file:
            return self._random(int(random_file[1]))
        if shard:
            return self._optimizer.shard(self.layout, int(shard[2]))
        return {MODEL_FILE: self._model, STATE_FILE: self._state}.get(name, lambda: None)()

    def _model(self) -> dict[str, Any]:
        content = {**self.written.model, "dp_world_size": self.layout.world_size}
        if self.written.precision is not None:
            groups = self._optimizer.shapes(self.layout, self.rank)
            trained = {name for group in groups for name in group}
            content["param_shapes"] = [OrderedDict(_sizes(group)) for group in groups]
            if content.get("frozen_param_shapes") is not None:
                content["frozen_param_shapes"] = self._frozen(content["frozen_param_shapes"], trained)
            if content.get("lr_scheduler"):
                content["lr_scheduler"] = self._schedule(content["lr_scheduler"])
        return content

    def _frozen(self, before: dict[str, Any], trained: set[str]) -> OrderedDict[str, torch.Size]:
        """Shapes of this rank's parameters that are in no optimizer."""
        found = OrderedDict((name, size) for name, size in before.items() if not EXPERT_PARAMETER.fullmatch(name))
        first = self._optimizer.first_expert(self.layout, self.rank)
        for layer in self.written.born:
            for expert in range(first, first + self.written.num_experts // self.layout.ep_size):
                path = self.written.folder / EXPERT_FILE.format(layer=layer, expert=expert)
                own = {renumbered(name, -first): stored.shape for name, stored in read_disk_tensors(path).items()}
                found.update((name, size) for name, size in _sizes(own).items() if name not in trained)
        return found

    def _schedule(self, state: Any) -> Any:
        """A learning-rate scheduler's state for this rank's groups; rank 0 has written its own."""
        before = self._optimizer.keys(self.written.layout, 0)
        return _for_groups(state, before, self._optimizer.keys(self.layout, self.rank))

    def _state(self) -> dict[str, Any]:
        state = self.written.state or {}
        # A check that has measured but not decided hangs on the ranks' own rows.
        config = {**state["mocte"]["config"], "ep_size": self.layout.ep_size}
        return {**state, "mocte": {**state["mocte"], "config": config, "check": None}}

    def _random(self, rank: int) -> dict[str, Any]:
        """States of a rank's generators; a rank that did not exist gets its own from the run's name and step."""
        manifest = self.written.manifest
        existing = read_disk_tensors(self.written.folder / RANDOM_FILE.format(rank=min(rank, manifest.world_size - 1)))
        if rank < manifest.world_size:
            return {name: state for name, state in existing.items() if name != "mocte"}
        text = f"{manifest.run} step {manifest.step} rank {rank}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        states = generator_states(random.Random(seed), np.random.RandomState(seed), torch.Generator().manual_seed(seed))
        offset = torch.tensor([seed, 0]).view(torch.uint8)  # seed and offset, as CUDA's generator has them
        if "cuda" in existing and existing["cuda"].shape == tuple(offset.shape):
            states["cuda"] = offset
        return states


def require_divisible(layout: RankLayout, num_experts: int) -> None:
    """Refuse a layout that the experts cannot be spread over.

    Raises:
        CheckpointError: names the sizes that would be possible.
    """
    ranks, ep_size = layout.world_size, layout.ep_size
    if ranks > _MOST_RANKS:
        raise CheckpointError(f"{ranks} ranks are more than the {_MOST_RANKS} that a checkpoint is written for.")
    if ranks < 1 or ep_size < 1 or ranks % ep_size or num_experts % ep_size:
        both = math.gcd(ranks, num_experts) if ranks > 0 else 0
        allowed = [n for n in range(1, min(both, _MOST_SHOWN) + 1) if both % n == 0]
        raise CheckpointError(
            f"ep_size {ep_size} does not divide {ranks} ranks and {num_experts} experts; ep_size can be "
            f"{', '.join(map(str, allowed)) or 'nothing: take 1 or more ranks'}."
        )


def _sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _for_groups(state: Any, before: Sequence[Key], now: Sequence[Key]) -> Any:
    """The state of a learning-rate scheduler with every list of one number per group rearranged.

    Args:
        state: of any scheduler of torch or DeepSpeed, nested ones included.
        before: groups of the rank that wrote it.
        now: groups of this rank; one that is new follows a group with the same options, else the first, as in a run.
    """
    if before == now or not before:
        return state
    options = [key[1] for key in before]
    sources = [before.index(key) if key in before else options.index(key[1]) if key[1] in options else 0 for key in now]
    return _rearranged(state, len(before), sources)


def _rearranged(state: Any, count: int, sources: list[int]) -> Any:
    if isinstance(state, dict):
        return {name: _rearranged(value, count, sources) for name, value in state.items()}
    if isinstance(state, list):
        if len(state) == count and all(item is None or isinstance(item, int | float) for item in state):
            return [state[source] for source in sources]
        return [_rearranged(item, count, sources) for item in state]
    return state
