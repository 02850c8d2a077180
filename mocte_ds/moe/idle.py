"""FFNs and experts that do not run take no memory: freed while they wait for their birth or have been replaced.

A parameter that is freed keeps its place in the model, its data type, its device and its number of dimensions, all of
them of size 0: whatever computes with it, or copies into or out of it, fails by its shape. State dicts leave it out.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from mocte_ds.errors import ConfigError

_SHAPES = "_mocte_shapes"


def is_freed(part: nn.Module) -> bool:
    """Whether the weights of a block's part are freed."""
    return hasattr(part, _SHAPES)


def shapes_when_held(part: nn.Module) -> dict[str, torch.Size]:
    """Shape of each parameter of a part that is freed, or is not."""
    return getattr(part, _SHAPES, None) or {name: parameter.shape for name, parameter in part.named_parameters()}


def mark_freed(part: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Say that the weights of a part are freed: state dicts leave it out."""
    setattr(part, _SHAPES, shapes)


def mark_held(part: nn.Module) -> None:
    """Say that the weights of a part are there."""
    delattr(part, _SHAPES)


@torch.no_grad()
def free(part: nn.Module) -> None:
    """Free the weights of a part, which ZeRO has not cut up; nothing if they are."""
    if is_freed(part):
        return
    mark_freed(part, shapes_when_held(part))
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            nothing = torch.empty((0,) * parameter.dim(), dtype=parameter.dtype)
            if parameter.is_meta:  # no data of the CPU can be given to it
                module.register_parameter(name, nn.Parameter(nothing, parameter.requires_grad))
            else:
                parameter.data, parameter.grad = nothing.to(parameter.device), None


@torch.no_grad()
def allocate(part: nn.Module) -> None:
    """Give the parameters of a part that is freed zeros in their shapes; nothing if it is not."""
    if not is_freed(part):
        return
    shapes = shapes_when_held(part)
    for name, parameter in part.named_parameters():
        parameter.data = parameter.data.new_zeros(shapes[name])
    mark_held(part)


@torch.no_grad()
def leave_untouched(part: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give a part weights without values, whose memory the system hands out only when somebody writes to it.

    Args:
        part: in CPU memory; what its weights were is lost.
        dtype: of floating-point weights; None: as before.
    """
    for parameter in part.parameters():
        parameter.data = torch.empty_like(parameter, dtype=dtype if parameter.is_floating_point() else None)


def leave_out_when_freed(owner: nn.Module, path: str) -> None:
    """Let state dicts of a module leave out a part of it while that is freed.

    What a state dict that is loaded has for it, as checkpoints of earlier versions do, is passed over.

    Args:
        owner: the module.
        path: of the part in it.
    """
    owner.register_state_dict_post_hook(partial(_leave_out, path))
    owner.register_load_state_dict_pre_hook(partial(_pass_over, path))


def _leave_out(path: str, owner: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if is_freed(owner.get_submodule(path)):
        for name in [name for name in state if name.startswith(f"{prefix}{path}.")]:
            del state[name]


def _pass_over(path: str, owner: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    part = owner.get_submodule(path)
    if is_freed(part):
        state.update({f"{prefix}{path}.{name}": now for name, now in part.state_dict(keep_vars=True).items()})


def require_unshared(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Refuse FFNs that share a parameter with anything else: it would be freed with them.

    Args:
        model: any model.
        blocks: its FFNs by their paths.

    Raises:
        ConfigError: names both.
    """
    names: dict[int, str] = {}
    owner = {id(p): name for name, ffn in blocks.items() for p in ffn.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in owner:
            continue
        first = names.setdefault(id(parameter), name)
        ffn = owner[id(parameter)]
        if not (first.startswith(f"{ffn}.") and name.startswith(f"{ffn}.")):
            raise ConfigError(
                f"mocte.modules matches {ffn}, and {first} is the same parameter as {name}: an FFN that experts take "
                "the place of must not share weights. Leave it out, or untie them."
            )


def freed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of all parts of a model that are freed."""
    return {parameter for part in model.modules() if is_freed(part) for parameter in part.parameters()}
