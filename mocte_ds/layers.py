"""The layers of a model, and what is done to their weights while one of them is called."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


def layers_of(model: nn.Module) -> set[nn.Module]:
    """Members of lists of modules that lie in no other list."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {part for members in lists for part in members.modules() if part is not members}
    return {member for members in lists if members not in inner for member in members}


@contextlib.contextmanager
def around_layers(
    model: nn.Module, before: Callable[[nn.Module], object], after: Callable[[nn.Module], object]
) -> Iterator[None]:
    """Within it something is done to each layer before it is called, and after that.

    Args:
        model: any model.
        before: called with the layer.
        after: called with the layer, unless its forward pass fails.
    """
    layers = layers_of(model)
    hooks = [layer.register_forward_pre_hook(lambda layer, _: _nothing(before(layer))) for layer in layers]
    hooks += [layer.register_forward_hook(lambda layer, *_: _nothing(after(layer))) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(_done: object) -> None:
    """What a hook returns that changes neither input nor output."""
