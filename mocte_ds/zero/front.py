"""The front of a model, which can be frozen from below: its embeddings, then one layer after another."""

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.moe.attach import holds, stack_of
from mocte_ds.moe.block import Block

EMBEDDINGS = "front.embeddings"


@dataclass(frozen=True)
class Front:
    """Units that freeze in this order: the embeddings with the first layer, then the other layers."""

    embeddings: tuple[nn.Parameter, ...]
    """Parameters of all embedding tables outside of the layers; a tied output matrix is one of them."""
    names: tuple[str, ...]
    """Paths of the layers in the model, front to back."""
    layers: tuple[nn.Module, ...]
    """The layers."""
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False)
    _without_graph: dict[int, Callable | None] = field(default_factory=dict, repr=False)
    """Layers that run without a graph, and the forward function that the instance itself had."""

    def units(self, frozen: int = 0) -> list[str]:
        """Names of the units of the front, except those of the first ``frozen`` layers."""
        names = [layer_unit(i) for i in range(frozen, len(self.layers))]
        return names if frozen else [EMBEDDINGS, *names]

    def layer_of(self, block: Block) -> int | None:
        """Number of the front's layer that a block lies in; None: after the front."""
        return next((i for i, layer in enumerate(self.layers) if holds(layer, block)), None)

    def run_without_graph(self, model: nn.Module, frozen: int) -> None:
        """Let the first ``frozen`` layers run under no_grad.

        Frozen parameters alone are not enough: transformers marks the embeddings' output as one that needs a gradient
        when activations are checkpointed, and then every layer builds a graph.

        Args:
            model: the model that this is the front of.
            frozen: layers, whose parameters and the embeddings' are frozen already.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for i, layer in enumerate(self.layers):
            if i < frozen and i not in self._without_graph:
                self._without_graph[i] = vars(layer).get("forward")
                layer.forward = types.MethodType(_without_graph(self._without_graph[i]), layer)  # type: ignore[method-assign]
            elif i >= frozen and i in self._without_graph:  # a checkpoint of before the freeze was loaded
                own = self._without_graph.pop(i)
                del layer.forward
                if own is not None:
                    layer.forward = own  # type: ignore[method-assign]
        if frozen:
            names = {parameter: name for name, parameter in model.named_parameters()}
            check = functools.partial(_refuse_what_trains_below, names)
            self._hooks.append(self.layers[0].register_forward_pre_hook(check, with_kwargs=True))
            self._hooks.append(self.layers[frozen - 1].register_forward_hook(_start_of_graph))


def _without_graph(own: Callable | None) -> Callable:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            # Through the class, so that a copy of the layer runs with its own weights.
            return own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)

    return forward


def _start_of_graph(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Reentrant checkpointing of the first layer that trains computes no gradient unless its input needs one."""
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, tuple):
        return (output[0].detach().requires_grad_(), *output[1:])
    return output.detach().requires_grad_()


def _refuse_what_trains_below(
    names: dict[nn.Parameter, str], _module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Refuse what trains before the front: without a graph through it, that would silently get no gradient."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            for leaf in _leaves(value.grad_fn):
                if leaf in names:
                    raise MocteError(
                        f"{names[leaf]} trains, and its output goes into the frozen front of the model, through which "
                        "no gradient is computed. Leave it out of model_parameters, or set mocte.freeze.prefix.layers "
                        "to 0."
                    )


def _leaves(node: Any) -> Iterator[Tensor]:
    """Leaf tensors of a graph."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)


def layer_unit(layer: int) -> str:
    """Name of the unit of a front layer: all of the layer except its block."""
    return f"front.{layer}"


def find_front(model: nn.Module, blocks: list[Block], layers: int) -> Front | None:
    """The first ``layers`` layers of the stack that the blocks lie in, and the embeddings below.

    Args:
        model: with its blocks attached.
        blocks: its blocks.
        layers: how many layers may freeze; 0: the model has no front.

    Raises:
        ConfigError: the blocks do not lie in an nn.ModuleList, or it has too few layers.
    """
    if not layers:
        return None
    found = stack_of(model, blocks[0])
    if found is None:
        raise ConfigError(
            f"mocte.freeze.prefix needs a model whose layers stand in an nn.ModuleList; {blocks[0].name} lies in none."
        )
    stack, members = found
    if layers > len(members):
        raise ConfigError(f"mocte.freeze.prefix.layers = {layers} is more than the {len(members)} layers of {stack}.")
    names = tuple(f"{stack}.{i}" for i in range(layers))
    tables = [
        table
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{stack}.")
        for table in module.parameters()
    ]
    return Front(tuple(dict.fromkeys(tables)), names, tuple(members[i] for i in range(layers)))
