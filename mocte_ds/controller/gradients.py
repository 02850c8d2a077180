"""At some checks: do the tokens of an FFN or expert want the same change, and do the sources of the text disagree?

One forward and one backward pass over the probe set give the rows that each dense FFN or expert reads and the gradient
of the loss by its outputs. No weight's gradient is computed: autograd is asked for the outputs' only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.controller.probe import ProbeSet
from mocte_ds.controller.state import RunState
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, BlockMode
from mocte_ds.trainability import coherence, conflict, ghost_gram

# Rows of an expert that the Gram matrix is made of; its cost grows with the square.
ROWS = 256
DENSE = -1
"""Number of a block's dense FFN among its experts."""


@dataclass
class _Seen:
    """What one module saw in a pass."""

    rows: Tensor
    output: Tensor


def read_conflict(run: RunState, probe: ProbeSet) -> dict[int, dict[int, dict[str, float]]]:
    """Coherence and conflict of every dense FFN in warm-up and every expert after it (collective).

    Returns:
        By block and expert (:data:`DENSE` for the dense FFN): "rows", "kappa", and, where at least two sources have
        gradients there, "cosine", "negative", "R" and "Q" between the sources (see :class:`Conflict`). Replicas of an
        expert are averaged.
    """
    blocks = [handle.block for handle in run.blocks]
    seen: dict[tuple[int, int], _Seen] = {}
    hooks = [module.register_forward_hook(_keep(seen, key)) for key, module in _modules(run, blocks).items()]
    try:
        look = probe.read_gradient(run.module, blocks, next(run.module.parameters()).device)
    finally:
        for hook in hooks:
            hook.remove()
    if look is None:
        return {}
    keys = [key for key in sorted(seen) if seen[key].output.requires_grad]
    gradients = torch.autograd.grad(look.loss, [seen[key].output for key in keys], allow_unused=True)
    own = {}
    for key, gradient in zip(keys, gradients, strict=True):
        if gradient is not None:
            numbers = _numbers(run, key, seen[key].rows, gradient, look.groups)
            if numbers:
                own[key] = numbers
    found: dict[int, dict[int, dict[str, float]]] = {}
    everywhere = gather_objects(own)
    for block, k in sorted({key for part in everywhere for key in part}):
        parts = [part[block, k] for part in everywhere if (block, k) in part]
        names = dict.fromkeys(name for part in parts for name in part)
        means = {name: _mean([part[name] for part in parts if name in part]) for name in names}
        means["rows"] = sum(part["rows"] for part in parts)
        found.setdefault(block, {})[k] = means
    return found


def block_conflict(found: dict[int, dict[str, float]] | None) -> dict[str, float] | None:
    """One block's numbers for the log: of its dense FFN, or the means over its experts."""
    if not found:
        return None
    names = dict.fromkeys(name for numbers in found.values() for name in numbers)
    means = {name: _mean([n[name] for n in found.values() if name in n]) for name in names}
    return {**means, "rows": sum(numbers["rows"] for numbers in found.values())}


def _modules(run: RunState, blocks: list[Block]) -> dict[tuple[int, int], nn.Module]:
    """The modules that are looked at on this rank, by block and expert."""
    modules: dict[tuple[int, int], nn.Module] = {}
    for i, block in enumerate(blocks):
        if block.mode is BlockMode.WARMUP:
            modules[i, DENSE] = block.dense
            continue
        for number, bank in enumerate(block.banks):
            for local, expert in enumerate(bank.local_experts):
                modules[i, number * bank.num_experts + bank.first_local(run.ep_rank) + local] = expert
    return modules


def _keep(seen: dict[tuple[int, int], _Seen], key: tuple[int, int]) -> Any:
    def hook(_module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen[key] = _Seen(args[0].detach().reshape(-1, args[0].shape[-1]), output)

    return hook


def _numbers(
    run: RunState,
    key: tuple[int, int],
    rows: Tensor,
    gradient: Tensor,
    groups: dict[tuple[int, int], Tensor],
) -> dict[str, float] | None:
    """The numbers of one module, from an even choice of its rows; None where no row has a gradient."""
    gradient = gradient.reshape(rows.shape[0], -1).float()
    group = groups.get(key)
    count = rows.shape[0] if group is None else len(group)  # experts' rows are padded behind these
    step = max(1, math.ceil(count / ROWS))
    chosen = slice(0, count, step)
    module = _modules(run, [handle.block for handle in run.blocks])[key]
    try:
        gram = ghost_gram(module, rows[chosen].float(), gradient[chosen])
        found = {"rows": float(gram.shape[0]), "kappa": coherence(gram)}
    except MocteError:
        return None  # nothing was routed there, or nothing of it reaches the loss
    if group is not None:
        try:
            between = conflict(gram, group[chosen].to(gram.device), unbiased=True)
        except MocteError:
            return found  # all of one source
        named = {"cosine": between.mean_cosine, "negative": between.negative, "R": between.ratio, "Q": between.q}
        found.update({name: value for name, value in named.items() if math.isfinite(value)})
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
