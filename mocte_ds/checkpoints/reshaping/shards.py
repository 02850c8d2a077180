"""A rank's file of master weights and moments: taken apart into its parameter groups, and made of them."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints.disk_tensors import DiskTensor, read_disk_tensors
from mocte_ds.checkpoints.names import renumbered
from mocte_ds.checkpoints.values import object_fields, plain_object, require_keys
from mocte_ds.errors import CheckpointError
from mocte_ds.shown import one_line

Key = tuple[str, int]
"""Unit and set of options of a parameter group; in a run without blocks the unit is "" and groups are counted."""

_STATE, _BASE, _MASTERS = "optimizer_state_dict", "base_optimizer_state", "single_partition_of_fp32_groups"
_LISTS = (_MASTERS, "group_paddings", "param_alignment_paddings", "partition_count", "param_slice_mappings")


@dataclass(frozen=True)
class GroupPart:
    """What one rank has of a parameter group."""

    settings: dict[str, Any]
    """Learning rate and the like: the group without its parameters."""
    master: DiskTensor
    """(n,) master weights, without padding at the end."""
    padding: int
    """Elements of padding that the rank holds after them."""
    ranks: int
    """Ranks that share the group."""
    state: dict[str, Any]
    """Moments (n + padding,), and what is not partitioned."""
    fragments: dict[str, tuple[int, int]]
    """Start in the part and elements of each parameter that lies in it; experts by their numbers in the bank."""
    alignment: list[int]
    """Elements of padding after each parameter of the whole group."""

    @property
    def is_expert(self) -> bool:
        """Whether it is shared only by the ranks that hold the same experts."""
        return bool(self.settings.get("moe"))


@dataclass(frozen=True)
class Shard:
    """The content of one rank's file."""

    parts: dict[Key, GroupPart]
    """In the order of the rank."""
    common: dict[str, Any]
    """Fields that belong to no single group, with None in the place of those that do; the same on all ranks."""

    @classmethod
    def read(cls, path: Path, first: int) -> "Shard":
        """Read a file, its tensors apart.

        Args:
            path: the file.
            first: number in its bank of the rank's first expert.

        Raises:
            CheckpointError: it is not of a supported optimizer, or not what it should be; names the file.
        """
        content = require_keys(read_disk_tensors(path), (_STATE,), path)
        state = require_keys(content[_STATE], (_BASE,), path)
        if isinstance(state[_BASE], list):
            raise CheckpointError(f"{path} is of zero_optimization.elastic_checkpoint, which is not supported.")
        require_keys(state, ("zero_stage", *_LISTS), path)
        if state["zero_stage"] not in (1, 2):
            raise CheckpointError(f"{path} is of ZeRO stage {state['zero_stage']}: only 1 and 2 are supported.")
        base = require_keys(state[_BASE], ("state", "param_groups"), path)
        try:
            parts = {}
            for number, (group, *values) in enumerate(
                zip(base["param_groups"], *(state[name] for name in _LISTS), strict=True)
            ):
                own = base["state"].get(group["params"][0], {})
                parts[group.get("unit", ""), group.get("options", number)] = _part(group, own, first, *values)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not an optimizer's file of ours: {type(error).__name__}: {one_line(error)}."
            ) from error
        common = {name: None if name == _BASE or name in _LISTS else value for name, value in state.items()}
        return cls(parts, {**content, _STATE: common})

    def content(self, first: int) -> dict[str, Any]:
        """The file of a rank whose first expert has the number ``first`` in its bank."""
        parts = list(self.parts.values())
        groups = [{**part.settings, "params": [number]} for number, part in enumerate(parts)]
        lists = {
            _BASE: {"state": {i: part.state for i, part in enumerate(parts) if part.state}, "param_groups": groups},
            _MASTERS: [part.master for part in parts],
            "group_paddings": [part.padding for part in parts],
            "param_alignment_paddings": [part.alignment for part in parts],
            "partition_count": [part.ranks for part in parts],
            "param_slice_mappings": [_addresses(part.fragments, first) for part in parts],
        }
        return {**self.common, _STATE: {name: lists.get(name, value) for name, value in self.common[_STATE].items()}}


def is_vector(value: Any) -> bool:
    """Whether a value of the optimizer's state is partitioned like the master weights."""
    return isinstance(value, DiskTensor) and len(value.shape) == 1


def _part(
    group: dict[str, Any],
    state: dict[str, Any],
    first: int,
    master: DiskTensor,
    padding: int,
    alignment: list[int],
    ranks: int,
    addresses: dict[str, Any],
) -> GroupPart:
    settings = {name: value for name, value in group.items() if name != "params"}
    fragments = {
        renumbered(name, first): (int(fields["start"]), int(fields["numel"]))
        for name, fields in ((name, object_fields(address)) for name, address in addresses.items())
    }
    if len(master.shape) != 1 or master.dtype != torch.float32 or not fragments and master.numel:
        raise ValueError(f"its master weights are {master.dtype} of the shape {master.shape}")
    for name, value in state.items():
        if (
            is_vector(value)
            and value.numel != master.numel + padding
            or isinstance(value, DiskTensor)
            and value.shape[1:]
        ):
            raise ValueError(f"its {name} has the shape {value.shape} for {master.numel} + {padding} master weights")
    return GroupPart(settings, master, padding, ranks, state, fragments, alignment)


def _addresses(fragments: dict[str, tuple[int, int]], first: int) -> OrderedDict[str, Any]:
    return OrderedDict(
        (renumbered(name, -first), plain_object("fragment_address", {"numel": numel, "start": start}))
        for name, (start, numel) in fragments.items()
    )
