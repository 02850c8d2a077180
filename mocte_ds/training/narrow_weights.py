"""First weights in the type that a run computes in: never more than a layer, or a matrix outside, of them in fp32."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mocte_ds.layers import around_layers, layers_of


@contextlib.contextmanager
def narrow_weights(dtype: torch.dtype, finish: Callable[[nn.Module, Any], object]) -> Iterator[None]:
    """Within it models of transformers are made in ``dtype``, with the numbers that they would draw in fp32, rounded.

    A model of 7 billion weights that is drawn in fp32 and rounded afterwards takes 27 GB on every rank, and 14 GB like
    this. Numbers drawn in bf16 would be others, so a constructor draws in fp32 and its module is rounded as soon as it
    belongs to another; what transformers then draw over it is rounded at the end of each layer, and outside of layers
    at the end of each module's turn.

    Args:
        dtype: of every floating-point parameter at the end; buffers stay.
        finish: called with each layer, and its model's config, when its weights are drawn and not rounded yet.
    """
    from transformers import PreTrainedModel

    draw = PreTrainedModel._initialize_weights
    layers: dict[int, set[nn.Module]] = {}
    inside: dict[int, set[nn.Module]] = {}

    @functools.wraps(draw)
    def in_layers(model: Any, module: nn.Module, *rest: Any) -> None:
        if id(model) not in layers:
            layers[id(model)] = layers_of(model)
            inside[id(model)] = {part for layer in layers[id(model)] for part in layer.modules()}
        # Classes draw weights of a module, or of its children, when its turn comes.
        for part in (module, *module.children()):
            cast_parameters(part, torch.float32, recurse=False)
        draw(model, module, *rest)
        if module in layers[id(model)]:
            finish(module, model.config)
            cast_parameters(module, dtype)
        elif module not in inside[id(model)]:
            for part in (module, *module.children()):
                cast_parameters(part, dtype, recurse=False)

    hook = register_module_module_registration_hook(lambda _owner, _name, module: _rounded(module, dtype))
    PreTrainedModel._initialize_weights = in_layers
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = draw
        hook.remove()


@contextlib.contextmanager
def computed_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within it a model computes in fp32: a layer's weights while it is called, the others all the time.

    Args:
        model: of one floating-point type, which its parameters have again at the end.
    """
    dtype = next(model.parameters()).dtype
    in_layers = {id(parameter) for layer in layers_of(model) for parameter in layer.parameters()}
    others = [part for part in model.modules() if not any(id(p) in in_layers for p in part.parameters(recurse=False))]
    for part in others:
        cast_parameters(part, torch.float32, recurse=False)
    try:
        with around_layers(
            model, lambda layer: cast_parameters(layer, torch.float32), lambda layer: cast_parameters(layer, dtype)
        ):
            yield
    finally:
        cast_parameters(model, dtype)


def cast_parameters(module: nn.Module, dtype: torch.dtype, recurse: bool = True) -> None:
    """Change the type of a module's floating-point parameters, which stay the same objects."""
    for parameter in module.parameters(recurse):
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _rounded(module: nn.Module | None, dtype: torch.dtype) -> None:
    if module is not None:
        cast_parameters(module, dtype)
