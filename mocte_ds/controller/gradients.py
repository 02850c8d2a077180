"""At some checks: do the tokens of an FFN or expert want the same change, and do the sources of the text disagree?

One forward and one backward pass over the probe set give the rows that each dense FFN or expert reads and the gradient
of the loss by its outputs. No weight's gradient is computed: autograd is asked for the outputs' only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.probe import ProbeSet
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import gather_objects, max_over_ranks, world
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, BlockMode
from mocte_ds.trainability import coherence, conflict, ghost_gram
from mocte_ds.zero import let_go, on_its_own

# Rows of an expert that the Gram matrix is made of; its cost grows with the square.
ROWS = 256
DENSE = -1
"""Number of a block's dense FFN among its experts."""


@dataclass
class _Seen:
    """What one module saw in a pass."""

    rows: Tensor
    output: Tensor


@dataclass
class _Groups:
    """Groups of the probe set's sequences, over all ranks, -1 where unknown; what "conflict" is between."""

    source: Tensor
    """(N,) of the text."""
    cluster: dict[int, Tensor]
    """By block (N,) the cluster that the sequence's mean feature is in, as the last check has found them."""


def read_conflict(run: RunState, probe: ProbeSet) -> dict[int, dict[int, dict[str, float]]]:
    """Coherence and conflict of every dense FFN in warm-up and every expert after it (collective).

    Returns:
        By block and expert (:data:`DENSE` for the dense FFN): "rows", "kappa", and, where at least two sources have
        gradients there, "cosine", "negative", "R" and "Q" between the sources (see :class:`Conflict`); the same with
        "cluster_" in front between the clusters of the documents. Replicas of an expert are averaged.
    """
    blocks = [handle.block for handle in run.blocks]
    modules = _modules(run, blocks)
    seen: dict[tuple[int, int], _Seen] = {}
    means: dict[int, Tensor] = {}
    stride = int(max_over_ranks(torch.tensor(len(probe.domain))))
    hooks = [module.register_forward_hook(_keep(seen, key)) for key, module in modules.items()]
    real = probe.real if probe.complete else None
    hooks += [block.register_forward_hook(_keep_mean(means, i, real)) for i, block in enumerate(blocks)]
    try:
        device = next(run.module.parameters()).device
        look = probe.read_gradient(run.module, blocks, device, world()[0] * stride)
    finally:
        for hook in hooks:
            hook.remove()
    if look is None:
        let_go(run.module)
        return {}
    groups = _groups(run, probe.domain, means, stride)
    keys = [key for key in sorted(seen) if seen[key].output.requires_grad]
    outputs = [seen[key].output for key in keys]
    # Behind a frozen front that holds all blocks nothing has a gradient.
    gradients = torch.autograd.grad(look.loss, outputs, allow_unused=True) if outputs else ()
    let_go(run.module)
    own = {}
    found_gradients = dict(zip(keys, gradients, strict=True))
    for key in sorted(modules):
        gradient = found_gradients.get(key)
        with on_its_own(modules[key]):  # by all that share it, also where nothing was found
            if gradient is not None:
                numbers = _numbers(modules[key], key, seen[key].rows, gradient, look.sequence.get(key), groups)
                if numbers:
                    own[key] = numbers
    found: dict[int, dict[int, dict[str, float]]] = {}
    everywhere = gather_objects(own)
    for block, k in sorted({key for part in everywhere for key in part}):
        parts = [part[block, k] for part in everywhere if (block, k) in part]
        names = dict.fromkeys(name for part in parts for name in part)
        means_of = {name: _mean([part[name] for part in parts if name in part]) for name in names}
        means_of["rows"] = sum(part["rows"] for part in parts)
        found.setdefault(block, {})[k] = means_of
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


def _keep_mean(means: dict[int, Tensor], block: int, real: Tensor | None) -> Any:
    """Means of the sequences' tokens (S, T) that count, or of all where a sequence has none."""

    def hook(_module: nn.Module, args: tuple, _output: Any) -> None:
        assert real is not None
        rows = args[0].detach().float().reshape(len(real), -1, args[0].shape[-1])
        counts = real[:, : rows.shape[1]].to(rows.device)
        counts = torch.where(counts.any(dim=1, keepdim=True), counts, True)[..., None]
        means[block] = torch.where(counts, rows, 0.0).sum(dim=1) / counts.sum(dim=1)

    return hook


def _groups(run: RunState, domain: Tensor, means: dict[int, Tensor], stride: int) -> _Groups:
    """Source and clusters of the sequences of all ranks, in the order of their numbers (collective)."""
    own = {handle.index: _clusters_of(handle, means[handle.index]) for handle in run.blocks}
    parts = gather_objects((domain.tolist(), own))

    def joined(lists: list[list[int]]) -> Tensor:
        return torch.tensor([value for part in lists for value in [*part, *[-1] * (stride - len(part))]])

    clusters = {block: joined([part[1][block] for part in parts]) for block in own}
    return _Groups(joined([part[0] for part in parts]), clusters)


def _clusters_of(handle: BlockHandle, means: Tensor) -> list[int]:
    """Cluster of each sequence; -1 while none is known."""
    last = handle.last_clusters
    return [-1] * len(means) if last is None else last.assign(means.cpu()).tolist()


def _numbers(
    module: nn.Module,
    key: tuple[int, int],
    rows: Tensor,
    gradient: Tensor,
    sequence: Tensor | None,
    groups: _Groups,
) -> dict[str, float] | None:
    """The numbers of one module, from an even choice of its rows; None where no row has a gradient."""
    gradient = gradient.reshape(rows.shape[0], -1).float()
    count = rows.shape[0] if sequence is None else len(sequence)  # experts' rows are padded behind these
    chosen = slice(0, count, max(1, math.ceil(count / ROWS)))
    try:
        gram = ghost_gram(module, rows[chosen].float(), gradient[chosen])
        found = {"rows": float(gram.shape[0]), "kappa": coherence(gram)}
    except MocteError:
        return None  # nothing was routed there, or nothing of it reaches the loss
    if sequence is None:
        return found
    number = sequence[chosen].cpu()
    for prefix, table in (("", groups.source), ("cluster_", groups.cluster[key[0]])):
        group = torch.where(number >= 0, table[number.clamp(min=0)], -1)
        try:
            between = conflict(gram, group.to(gram.device), unbiased=True)
        except MocteError:
            continue  # all of one group
        named = {"cosine": between.mean_cosine, "negative": between.negative, "R": between.ratio, "Q": between.q}
        found.update({prefix + name: value for name, value in named.items() if math.isfinite(value)})
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
