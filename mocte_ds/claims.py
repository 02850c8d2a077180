"""What a folder's config.json says of its sizes, held against what lies in its files, before anything is built."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mocte_ds.errors import CheckpointError

_LAYERS = re.compile(r"(num_|n_|^)(\w*_)?layers?$|^depth$|^first_k_dense_replace$")
_SIZES = re.compile(r"(_|^)(size|dim|dims|heads|inner|embd|width|ffn|rank)$|^d_(model|ff|kv|inner)$|experts")
_NO_SIZE = re.compile(r"window|chunk|max_window_layers|position")
_FEW = 64
"""Layers, experts or features that anybody may claim."""
_LEVELS = 8
"""Sections within sections of a config."""


def require_backed(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse a config whose sizes are larger than anything in the files: to build it could take all memory, or hours.

    A layer has at least one tensor; features, heads, tokens and experts are rows, columns or parts of them in one.

    Args:
        values: of config.json.
        shapes: of every tensor in the folder's files.
        path: of the config, for messages.

    Raises:
        CheckpointError: names the key, its value and what is there.
    """
    count = max(_FEW, len(shapes))
    most = max([_FEW, len(shapes), *(math.prod(shape) for shape in shapes.values())])
    for key, value in _numbers(values, 0, path):
        if _NO_SIZE.search(key):
            continue
        if _LAYERS.search(key) and abs(value) > count:
            raise CheckpointError(
                f"{path}: {key} = {_short(value)}, but the folder's files hold {len(shapes)} tensors, fewer than one a "
                "layer: the config belongs to another model, or is damaged."
            )
        if _SIZES.search(key) and abs(value) > most:
            raise CheckpointError(
                f"{path}: {key} = {_short(value)}, but the largest tensor of the folder's files has {most:,} numbers: "
                "the config belongs to another model, or is damaged."
            )


def require_layers(number: int, names: Mapping[str, Any], layers: str, path: Path) -> None:
    """Refuse another number of layers than lies in the files.

    Args:
        number: as the config says.
        names: of all tensors.
        layers: what the names of a layer's tensors begin with, before its number.
        path: of the config, for messages.

    Raises:
        CheckpointError: says which layer is missing or too much.
    """
    pattern = re.compile(re.escape(layers) + r"\.(\d{1,9})\.")
    there = {int(found[1]) for found in map(pattern.match, names) if found}
    if number > len(there) or there != set(range(number)):
        first = next(i for i in range(len(there) + 1) if i not in there or i >= number)
        what = f"has no tensor of {layers}.{first}" if first not in there else f"holds tensors of {layers}.{first}"
        raise CheckpointError(
            f"{path} says that there are {_short(number)} layers, but the folder {what}: the config belongs to another "
            "model, or files are missing."
        )


def require_experts(experts: int, layers: int, names: Mapping[str, Any], path: Path) -> None:
    """Refuse more experts than there are tensors: each has three of its own.

    Raises:
        CheckpointError: says how many are there.
    """
    if experts * layers > len(names):
        raise CheckpointError(
            f"{path} says that {layers} layers have {_short(experts)} experts each, but the folder's files hold "
            f"{len(names)} tensors: the config belongs to another model, or files are missing."
        )


def require_blocks(blocks: Any, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse blocks of experts that the files do not hold.

    Args:
        blocks: of the config of an own class around a base model.
        shapes: of every tensor in the folder's files.
        path: of the config, for messages.

    Raises:
        CheckpointError: another form, or more experts or larger ones than there are.
    """
    most, experts = max([_FEW, *(math.prod(shape) for shape in shapes.values())]), 0
    try:
        for block in blocks:
            sizes = [size for pair in block["expert_sizes"].values() for size in pair]
            if max(sizes + [block["hidden_size"], block["vocab_size"] or 0]) > most:
                raise CheckpointError(
                    f"{path}: the block {block['module']!r:.80} is larger than any tensor of the folder's files: the "
                    "config belongs to another model, or is damaged."
                )
            experts += block["num_experts"] * len(block["banks"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its blocks are damaged ({type(error).__name__}: {str(error)[:80]}).") from error
    if experts > len(shapes):
        raise CheckpointError(
            f"{path} says that there are {_short(experts)} experts, but the folder's files hold {len(shapes)} tensors: "
            "the config belongs to another model, or files are missing."
        )


def _numbers(values: Mapping[str, Any], level: int, path: Path) -> Iterator[tuple[str, float]]:
    if level > _LEVELS:
        raise CheckpointError(f"{path} has more than {_LEVELS} sections within each other; no model needs them.")
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, level + 1, path)
        elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            yield key, value


def _short(value: float) -> str:
    """Python refuses to write integers of many thousand digits."""
    return f"{value}" if abs(value) < 10**40 else "a number of more than 40 digits"
