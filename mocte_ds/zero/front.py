"""The front of a model, which can be frozen from below: its embeddings, then one layer after another."""

from dataclasses import dataclass

from torch import nn

from mocte_ds.errors import ConfigError
from mocte_ds.moe.block import Block

EMBEDDINGS = "front.embeddings"


@dataclass(frozen=True)
class Front:
    """Units that freeze in this order: the embeddings with the first layer, then the other layers."""

    embeddings: tuple[nn.Parameter, ...]
    """Of all embedding tables outside of the layers; a tied output matrix is one of them."""
    names: tuple[str, ...]
    """Paths of the layers in the model, front to back."""
    layers: tuple[nn.Module, ...]
    """The layers."""

    def units(self, frozen: int = 0) -> list[str]:
        """Names of the units of the front but for those of the first ``frozen`` layers."""
        names = [layer_unit(i) for i in range(frozen, len(self.layers))]
        return names if frozen else [EMBEDDINGS, *names]

    def layer_of(self, block: Block) -> int | None:
        """Number of the layer that a block lies in; None: behind the front."""
        return next((i for i, name in enumerate(self.names) if block.name.startswith(f"{name}.")), None)


def layer_unit(layer: int) -> str:
    """Name of the unit of a front layer: all of it but its block."""
    return f"front.{layer}"


def find_front(model: nn.Module, blocks: list[Block], layers: int) -> Front | None:
    """The first ``layers`` layers of the stack that the blocks lie in, and the embeddings below.

    Args:
        model: with its blocks attached.
        blocks: its blocks.
        layers: how many layers may freeze; 0: none, and there is no front.

    Raises:
        ConfigError: the blocks lie in no nn.ModuleList, or it has too few layers.
    """
    if not layers:
        return None
    stack = _stack(model, blocks[0])
    if layers > len(model.get_submodule(stack)):
        raise ConfigError(
            f"mocte.freeze.prefix.layers = {layers} is more than the {len(model.get_submodule(stack))} layers of "
            f"{stack}."
        )
    members = model.get_submodule(stack)
    names = tuple(f"{stack}.{i}" for i in range(layers))
    tables = [
        table
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{stack}.")
        for table in module.parameters()
    ]
    return Front(tuple(dict.fromkeys(tables)), names, tuple(members[i] for i in range(layers)))


def _stack(model: nn.Module, block: Block) -> str:
    """Path of the outermost list of modules around a block."""
    parts = block.name.split(".")
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    raise ConfigError(
        f"mocte.freeze.prefix needs a model whose layers stand in an nn.ModuleList; {block.name} lies in none."
    )
