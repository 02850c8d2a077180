"""Whether checks can call the model at all, found out at the first step and not at the first check."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.controller.probe import ProbeSet
from mocte_ds.dist.collectives import gather_objects, max_over_ranks
from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block
from mocte_ds.shown import one_line


def needs_labels(module: nn.Module) -> bool:
    """Whether the model's forward has a parameter `labels` without a default, so that checks must give it too."""
    labels = _parameters(module).get("labels")
    if labels is None or labels.kind not in (labels.POSITIONAL_OR_KEYWORD, labels.KEYWORD_ONLY):
        return False
    return labels.default is labels.empty


def require_callable(probe: ProbeSet, module: nn.Module, blocks: list[Block], device: torch.device, mesh: Mesh) -> None:
    """Call the model with one sequence of the first step, as a check will (collective).

    A set that was given, or comes from a checkpoint, is not tried. Each rank tries a sequence of its own; one that
    fails inside of a collective of the model itself (ZeRO stage 3) leaves the others waiting there.

    Raises:
        MocteError: on all ranks, if it fails on any; with the reason and what to do.
    """
    if int(max_over_ranks(torch.tensor(0 if probe.collected else 1), mesh.world)):
        return
    state = probe.state_dict()
    assert state is not None  # something was collected
    rows = len(state["valid"])

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        fits = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        return value[:1] if fits else value

    failure: Exception | None = None
    try:
        one = ProbeSet(1, None, mesh)
        one.load_state_dict(cut(state))
        one.read(module, blocks, device)
    except Exception as error:  # whatever a user's model raises
        failure = error
    # Each rank tries a sequence of its own. One that went on alone would wait for the others in its next collective.
    reasons = gather_objects(None if failure is None else _reason(failure), mesh.world)
    first = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
    if first is None:
        return
    given = [*(f"argument {number + 1}" for number in range(len(state["args"]))), *state["kwargs"]]
    where = f" on rank {first}" if len(reasons) > 1 else ""
    raise MocteError(
        f"checks call the model in evaluation mode with {', '.join(given)} of some sequences, and it fails{where}: "
        f"{reasons[first]}. Let forward work without what is missing, declare `labels` without a default if it needs "
        'them, or do without the probe set: "freeze": {"policy": "off"}, "probe_tokens": 0.'
    ) from failure


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # not written in Python
        return {}
