"""The whole optimizer of a checkpoint: the parameter groups of all ranks, and which rank has which in a layout."""

from dataclasses import replace
from typing import Any

from mocte_ds.checkpoints.disk_tensors import DiskTensor, read_disk_tensors
from mocte_ds.checkpoints.names import EXPERT_FILE, EXPERT_PARAMETER, MODEL_FILE, renumbered
from mocte_ds.checkpoints.reshaping.groups import cut, joined
from mocte_ds.checkpoints.reshaping.rank_layout import RankLayout
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.checkpoints.reshaping.shards import GroupPart, Key, Shard
from mocte_ds.errors import CheckpointError


class CheckpointOptimizer:
    """Master weights and moments of all ranks; nothing is read of them but where they lie."""

    def __init__(self, written: SavedCheckpoint) -> None:
        """Put together what the ranks have.

        Raises:
            CheckpointError: a file is damaged, of an optimizer that is not supported, or contradicts the others; names
                it.
        """
        self.written, layout = written, written.layout
        config = written.model["ds_config"]
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        if isinstance(zero, dict) and zero.get("round_robin_gradients"):
            raise CheckpointError(
                f"the checkpoint {written.folder} was written with zero_optimization.round_robin_gradients, which ties "
                "the order of the parameters to the number of ranks: it stays in its layout."
            )
        self._blocks: list[str] = [block["name"] for block in written.blocks]
        self._contents: dict[str, dict[str, DiskTensor]] = {}
        paths = [written.folder / written.optimizer_file(rank) for rank in range(layout.world_size)]
        self.shards = [Shard.read(path, self.first_expert(layout, rank)) for rank, path in enumerate(paths)]
        for shard, path in zip(self.shards, paths, strict=True):
            if shard.common != self.shards[0].common:
                raise CheckpointError(f"{path} has another state of the optimizer than {paths[0]}: of two checkpoints.")
        self.groups: dict[Key, GroupPart] = {}
        """Every group as a whole, experts with their numbers in the bank."""
        holders: dict[Key, list[int]] = {}
        for rank, shard in enumerate(self.shards):
            for key in shard.parts:
                holders.setdefault(key, []).append(rank)
        for key, ranks in holders.items():
            parts, files = [self.shards[rank].parts[key] for rank in ranks], [str(paths[rank]) for rank in ranks]
            wanted = layout.sharers(layout.ep_rank(ranks[0]) if parts[0].is_expert else None)
            if ranks != wanted:
                raise CheckpointError(
                    f"{files[0]} holds a part of {key[0] or 'the model'}, as {len(ranks)} of the ranks {wanted} do "
                    "that share it: it is of another rank or another run."
                )
            self.groups[key] = whole = joined(parts, files)
            self._require_model(key, whole, files[0])

    def first_expert(self, layout: RankLayout, rank: int) -> int:
        """Number in its bank of a rank's first expert."""
        return layout.ep_rank(rank) * (self.written.num_experts // layout.ep_size)

    def keys(self, layout: RankLayout, rank: int) -> list[Key]:
        """Groups of a rank in a layout, in its order."""
        first = self.first_expert(layout, rank)
        local = range(first, first + self.written.num_experts // layout.ep_size)
        mine = [key for key, whole in self.groups.items() if not whole.is_expert or self._number(whole) in local]
        return sorted(mine, key=self._place)

    def shard(self, layout: RankLayout, rank: int) -> dict[str, Any]:
        """Content of a rank's file in a layout."""
        parts = {}
        for key in self.keys(layout, rank):
            whole = self.groups[key]
            sharers = layout.sharers(layout.ep_rank(rank) if whole.is_expert else None)
            part = cut(whole, sharers.index(rank), len(sharers))
            if whole.is_expert:
                # DeepSpeed finds the process group by this name.
                part = replace(part, settings={**part.settings, "name": f"ep_size_{layout.ep_size}"})
            parts[key] = part
        return Shard(parts, self.shards[0].common).content(self.first_expert(layout, rank))

    def shapes(self, layout: RankLayout, rank: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of a rank's parameters, by group; experts with the rank's own numbers."""
        first = self.first_expert(layout, rank)
        groups = [self.groups[key] for key in self.keys(layout, rank)]
        return [{renumbered(name, -first): self._shape(name) for name in group.fragments} for group in groups]

    def _number(self, whole: GroupPart) -> int:
        """Of an expert in its bank."""
        found = EXPERT_PARAMETER.fullmatch(next(iter(whole.fragments)))
        return int(found[3]) if found else -1

    def _place(self, key: Key) -> tuple[int, int, int, int, int]:
        """Where a group stands: trunk, then block by block dense FFN, experts, router, then the model's front."""
        unit, options = key
        block, _, part = unit.rpartition(".")
        if block in self._blocks:
            kind = {"dense": 0, "router": 2}.get(part, 1)
            return 1, self._blocks.index(block), kind, int(part) if part.isdigit() else 0, options
        number = list(self.shards[0].parts).index(key)
        return 0 if unit in ("", "trunk") else 2, number, 0, 0, options

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter of the model.

        Raises:
            LookupError: the model has none of this name.
        """
        file, found = MODEL_FILE, EXPERT_PARAMETER.fullmatch(name)
        if found:
            layer = self._blocks.index(found[1]) * self.written.banks + int(found[2])
            file = EXPERT_FILE.format(layer=layer, expert=found[3])
        if file not in self._contents:
            content = (
                self.written.model["module"] if file == MODEL_FILE else read_disk_tensors(self.written.folder / file)
            )
            self._contents[file] = content
        return self._contents[file][name].shape

    def _require_model(self, key: Key, whole: GroupPart, file: str) -> None:
        """The parameters of a group must be the model's."""
        for name, (_, numel) in whole.fragments.items():
            found = EXPERT_PARAMETER.fullmatch(name)
            try:
                fits = DiskTensor(whole.master.dtype, self._shape(name), ()).numel == numel
                if found and whole.is_expert:
                    expert = int(found[2]) * self.written.num_experts + int(found[3])
                    fits = fits and key[0] == f"{found[1]}.{expert}"
            except (LookupError, TypeError, ValueError, AttributeError):
                fits = False
            if not fits or bool(found) != whole.is_expert:
                raise CheckpointError(
                    f"{file} holds {numel} elements of {name} in {key[0] or 'the model'}, which the model of this "
                    "checkpoint does not have: it is of another rank or another run."
                )
