"""Kernels made by torch.compile for what lies around the blocks: attention, norms, dense FFNs."""

from collections.abc import Iterator

from torch import nn

from mocte_ds.errors import ConfigError
from mocte_ds.layers import layers_of
from mocte_ds.moe.block import Block

_NOTHING_TO_FUSE = (nn.Linear, nn.Embedding, nn.Conv1d)
"""One product or one look-up, which has a kernel of its own."""


def compile_regions(model: nn.Module) -> list[str]:
    """Compile the parts of each layer in place, region by region; names of parameters and checkpoints stay as they are.

    Equal regions of different layers share their kernels, so that the time to compile does not grow with the number of
    layers. What blocks do depends on the data: a block's routing and its experts stay as they are, and its dense FFN is
    compiled where it has one that runs.

    Args:
        model: with or without blocks, and not partitioned by ZeRO-3; changed in place.

    Returns:
        Paths of what is compiled.

    Raises:
        ConfigError: nothing can be compiled, because the model has no list of layers.
    """
    found = list(_regions(model))
    if not found:
        raise ConfigError(
            f"training.compile: {type(model).__name__} keeps its layers in no nn.ModuleList, so there is nothing to "
            "compile; set it to false."
        )
    for _, region in found:
        region.compile()
    return [path for path, _ in found]


def _regions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    layers = layers_of(model)
    for path, module in model.named_modules():
        if module in layers:
            yield from _within(path, module)


def _within(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a layer, or, where a block lies in one, that one's; of a block its dense FFN."""
    if isinstance(module, Block):
        if "dense" not in module.idle:
            yield f"{path}.dense", module.dense
        return
    for name, child in module.named_children():
        if any(isinstance(part, Block) for part in child.modules()):
            yield from _within(f"{path}.{name}", child)
        elif not isinstance(child, _NOTHING_TO_FUSE) and any(True for _ in child.parameters()):
            yield f"{path}.{name}", child
