"""Memory of a block's parts in a run: allocated when they are to run, freed when they no longer do."""

import torch
from torch import nn

from mocte_ds.moe import idle
from mocte_ds.moe.block import Block


def follow_mode(block: Block) -> None:
    """Free what does not run in a block's mode, and give zeros to what does and was freed.

    On all ranks at once, between two steps, with weights let go (:func:`mocte_ds.zero.let_go`). The optimizer must not
    train what is freed any more when its next step comes.
    """
    for path, part in block.parts.items():
        if path in block.idle:
            free(part)
        else:
            allocate(part)


def allocate_experts(block: Block) -> None:
    """Give the experts of a block memory before they are born."""
    for path, part in block.parts.items():
        if path != "dense":
            allocate(part)


@torch.no_grad()
def free(part: nn.Module) -> None:
    """Free a part of a block; under ZeRO stage 3 what this rank holds of it, except what always stays gathered."""
    if not _is_cut(part):
        idle.free(part)
    elif not idle.is_freed(part):
        idle.mark_freed(part, {name: parameter.ds_shape for name, parameter in part.named_parameters()})
        for parameter in _let_go(part):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


@torch.no_grad()
def allocate(part: nn.Module) -> None:
    """The opposite of :func:`free`; the weights are zeros."""
    if not _is_cut(part):
        idle.allocate(part)
    elif idle.is_freed(part):
        for parameter in _let_go(part):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_zeros(parameter.partition_numel())
        idle.mark_held(part)


def _is_cut(part: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_tensor") for parameter in part.parameters())


def _let_go(part: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in part.parameters() if not parameter.ds_persist]
