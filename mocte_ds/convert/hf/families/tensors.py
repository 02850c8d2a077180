"""Where each tensor in the files of a mixture class has its numbers in a model with blocks, for both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mocte_ds.checkpoints.source import NARROW, Source
from mocte_ds.moe.block import Block

HEAD = "lm_head.weight"
LAYER = "model.layers.{layer}."
"""What the tensors of a layer begin with, in all families and in the dense classes that become one."""
MATRICES = ("gate_proj", "up_proj", "down_proj")

# Shapes: E experts, d features.


@dataclass(frozen=True)
class Pair:
    """A tensor in the files of a class, and where its numbers are in a model with blocks.

    Read from the left it is an import: the first of ``ours`` takes the tensor as it is, the others are zeros. Read from
    the right it is an export.
    """

    theirs: str
    shape: tuple[int, ...]
    """In the files."""
    ours: tuple[str, ...] = ()
    """None: only zeros fit, or what is made of nothing."""
    make: Callable[..., Tensor] = lambda tensor: tensor
    """Theirs, from ours in fp32."""
    exact: bool = False
    """Stored in fp32 always: a rounded boundary sends tokens elsewhere."""
    buffer: bool = False
    """It is not a parameter."""

    def dtype(self, kind: str) -> torch.dtype:
        """In the files of an export as `fp32`, `bf16` or `fp16`."""
        return torch.float32 if self.exact else NARROW.get(kind, torch.float32)

    def tensor(self, source: Source) -> Tensor:
        """As it is to be stored."""
        return self.make(*(source.read(name) for name in self.ours)).to(self.dtype(source.dtype))


def gate_tensor(block: Block, name: str) -> str:
    return f"{block.name}.banks.0.deepspeed_moe.gate.{name}"


def is_finer(source: Source, names: Sequence[str]) -> bool:
    """Whether the sum of some tensors has digits that the dtype of an export does not hold; True for one in fp32."""
    if source.dtype not in NARROW or not names:
        return True
    rows = total(*(source.read(name) for name in names))
    return not torch.equal(rows.to(NARROW[source.dtype]).float(), rows)


def total(first: Tensor, *others: Tensor) -> Tensor:
    return sum(others, first)


def padded_pair(theirs: str, ours: str, matrix: str, width: int, d: int) -> Pair:
    """A matrix of an FFN; hidden units of zeros fill it up to a width."""
    axis, shape = (1, (d, width)) if matrix == "down_proj" else (0, (width, d))
    return Pair(theirs, shape, (ours,), partial(_padded, axis=axis, size=width))


def _padded(matrix: Tensor, axis: int, size: int) -> Tensor:
    """A matrix with zeros added along an axis."""
    if matrix.shape[axis] == size:
        return matrix
    shape = list(matrix.shape)
    shape[axis] = size - matrix.shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=axis)
