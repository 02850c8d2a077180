"""Weights under ZeRO stage 3, of which every rank holds a part: what is held, and how to see all of it for a while.

Under stages 1 and 2 every rank has whole weights, and nothing here does anything.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def held(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of each parameter between two passes: a flat part with its padding, or all of it."""
    return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in parameters]


def let_go(model: nn.Module) -> None:
    """Drop the weights that passes have gathered; on all ranks at once, or they would not gather alike afterwards.

    Comes before everything that looks at weights between two passes.
    """
    optimizer = getattr(next(model.parameters()), "_z3_optimizer", None)
    if optimizer is not None:
        optimizer.let_go()


@contextlib.contextmanager
def exchanged(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> Iterator[None]:
    """Within it this rank holds other weights; afterwards the very same tensors as before.

    Args:
        parameters: not gathered at the moment, neither at the beginning nor at the end: see :func:`let_go`.
        values: what :func:`held` has returned of them at another time.
    """
    holders = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    now = [holder.data for holder in holders]
    for holder, value in zip(holders, values, strict=True):
        holder.data = value
    try:
        yield
    finally:
        for holder, tensor in zip(holders, now, strict=True):
            holder.data = tensor


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Within it the parameters have all of their weights (collective over the ranks that share them).

    Args:
        parameters: in the same order on all ranks that share one of them, and let go before. Whether they are gathered
            must not depend on what a single rank has seen.
        changed: the caller changes them, in the same way on all ranks that share them.
    """
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    if not cut:
        yield
        return
    cut[0].all_gather(param_list=cut)
    try:
        yield
    finally:
        cut[0].partition(param_list=cut, has_been_updated=changed)


@contextlib.contextmanager
def on_its_own(module: nn.Module) -> Iterator[None]:
    """Within it the module has whole weights, and this rank may call it alone (collective like :func:`whole`).

    DeepSpeed's hooks count every call of a module. Ranks that called different ones would wait for each other forever.
    """
    parameters = list(module.parameters())
    if not any(hasattr(parameter, "ds_tensor") for parameter in parameters):
        yield
        return
    parts = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    with whole(parameters):
        for part, _, _ in parts:
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for part, after, before in parts:
                part._forward_hooks, part._forward_pre_hooks = after, before
