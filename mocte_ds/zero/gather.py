"""Weights under ZeRO stage 3, of which every rank holds a part: what is held, and how to see all of it for a while.

Under stages 1 and 2 every rank has whole weights, and nothing here does anything.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from mocte_ds.moe.idle import freed_parameters


def held(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of each parameter between two passes: a flat part with its padding, or all of it."""
    return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in parameters]


def let_go(model: nn.Module) -> None:
    """Release weights that passes have gathered, except small persistent ones: the state after a step.

    Comes before everything that looks at weights between two passes; on all ranks at once, or they would not gather
    alike afterwards.
    """
    optimizer = getattr(next(model.parameters()), "_z3_optimizer", None)
    if optimizer is not None:
        optimizer.let_go()


@contextlib.contextmanager
def exchanged(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> Iterator[None]:
    """Context manager: the parameters have other weights in it, and the very same tensors as before after it.

    Args:
        parameters: let go before this and before its end; collective like :func:`whole`.
        values: what :func:`held` returned for them at another time.
    """
    parameters = list(parameters)
    holders = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    now = [holder.data for holder in holders]
    _hold(parameters, holders, values)
    try:
        yield
    finally:
        _hold(parameters, holders, now)


def _hold(parameters: list[nn.Parameter], holders: list[Tensor], values: Iterable[Tensor]) -> None:
    small = _gathered(parameters)
    if small:
        small[0].partition(param_list=small)
    for holder, value in zip(holders, values, strict=True):
        holder.data = value
    if small:
        small[0].all_gather(param_list=small)


def _gathered(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters of which stage 3 holds all weights at the moment."""
    return [p for p in parameters if getattr(p, "ds_status", None) is ZeroParamStatus.AVAILABLE]


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Context manager: the parameters have all of their weights (collective over the ranks that share them).

    Args:
        parameters: in the same order on all ranks that share one of them, and let go before. Whether they are gathered
            must not depend on what a single rank has seen.
        changed: the caller changes them, in the same way on all ranks that share them.
    """
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    if not cut:
        yield
        return
    small = _gathered(cut)
    cut[0].all_gather(param_list=cut)
    try:
        yield
    finally:
        cut[0].partition(param_list=cut, has_been_updated=changed)
        if small:
            small[0].all_gather(param_list=small)


@contextlib.contextmanager
def forward_pass(model: nn.Module) -> Iterator[None]:
    """Context manager for a call of the whole model: stage 3 notices weights that one module takes from another."""
    tables = [module._parameters for module in model.modules() if hasattr(module._parameters, "_in_forward")]
    for table in tables:
        table._in_forward = True
    try:
        yield
    finally:
        for table in tables:
            table._in_forward = False


@contextlib.contextmanager
def on_its_own(module: nn.Module) -> Iterator[None]:
    """Context manager: the module has all its weights, and this rank may call it alone (collective like :func:`whole`).

    DeepSpeed's hooks count every call of a module. Ranks that called different ones would wait for each other forever.
    Parts of it that are freed stay so.
    """
    freed = freed_parameters(module)
    parameters = [parameter for parameter in module.parameters() if parameter not in freed]
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
