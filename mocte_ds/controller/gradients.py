"""At some checks: do the tokens of an FFN or expert want the same change, and do the sources of the text disagree?

One forward and one backward pass over the probe set give the rows that each dense FFN or expert reads and the gradient
of the loss by its outputs. No weight's gradient is computed: autograd is asked for the outputs' only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.controller.expert_rows import ExpertRows, Wanted, found_rows, merged_rows
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.probe import ProbeSet
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, BlockMode
from mocte_ds.trainability import coherence, conflict, ghost_gram
from mocte_ds.zero import let_go, on_its_own

Key = tuple[int, int]
"""Block and expert."""
DENSE = -1
"""Stands for a block's dense FFN in place of an expert's number."""


@dataclass
class _Call:
    """What one module read in one of its calls."""

    rows: Tensor
    output: Tensor


@dataclass
class _Groups:
    """Groups between which "conflict" is measured: one number per sequence of the probe set, -1 where unknown."""

    source: Tensor
    """(N,) of the text."""
    cluster: dict[int, Tensor]
    """For each block (N,) the cluster of each sequence's mean feature, among those that were found last."""


def read_conflict(run: RunState, probe: ProbeSet) -> dict[int, dict[int, dict[str, float]]]:
    """Coherence and conflict of every dense FFN in warm-up and every expert after it (collective).

    Each is measured once, on exactly `freeze.rows` rows of the probe set that have a gradient, chosen by hash over all
    ranks, or not at all where there are fewer: kappa's floor is 1/n, so numbers of different n do not compare.

    Returns:
        By block and expert (:data:`DENSE` for the dense FFN): "rows", "kappa", and, where at least two sources have
        gradients there, "cosine", "negative", "R" and "Q" between the sources (see :class:`Conflict`); the same with
        "cluster_" in front between the clusters of the documents. The same on all ranks.
    """
    blocks = [handle.block for handle in run.blocks]
    modules = _modules(run, blocks)
    seen: dict[Key, list[_Call]] = {}
    means: dict[int, Tensor] = {}
    hooks = [module.register_forward_hook(_keep(seen, key)) for key, module in modules.items()]
    real = probe.real if probe.complete else None
    hooks += [block.register_forward_hook(_keep_mean(means, i, real)) for i, block in enumerate(blocks)]
    try:
        look = probe.read_gradient(run.module, blocks, next(run.module.parameters()).device)
    finally:
        for hook in hooks:
            hook.remove()
    if look is None:
        let_go(run.module)
        return {}
    groups = _groups(run, probe, means)
    calls = [
        (key, call, places)
        for key in sorted(seen.keys() & look.places.keys())
        for call, places in zip(seen[key], look.places[key], strict=True)
        if call.output.requires_grad
    ]
    # After a frozen front that holds all blocks nothing has a gradient.
    outputs = [call.output for _, call, _ in calls]
    gradients = torch.autograd.grad(look.loss, outputs, allow_unused=True) if outputs else ()
    let_go(run.module)
    kept = [ExpertRows(len(handle.experts) + 1, run.config.freeze.rows, run.config.seed) for handle in run.blocks]
    for ((block, k), call, places), gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            _offer(kept[block], k, call.rows, gradient, places)
    del seen, calls, outputs, gradients
    return _measured(run, modules, kept, groups)


def _offer(kept: ExpertRows, k: int, rows: Tensor, gradient: Tensor, places: Tensor) -> None:
    """Offer a module's rows that count and have a gradient to its sample: (row, gradient, number of the sequence)."""
    n = len(places)  # experts' rows are padded after these
    gradient, places = gradient.reshape(rows.shape[0], -1)[:n], places.to(rows.device)
    number = places[:, :1]
    counts = (number[:, 0] >= 0) & (gradient != 0).any(dim=1)
    features = torch.cat([rows[:n].float(), gradient.float(), number.float()], dim=1)
    kept.offer(features, torch.full_like(number, k - DENSE), places[:, 0], places[:, 1], counts)


def _measured(
    run: RunState, modules: dict[Key, nn.Module], kept: list[ExpertRows], groups: _Groups
) -> dict[int, dict[int, dict[str, float]]]:
    """The numbers of all modules with enough rows; the ranks that hold a module take turns (collective)."""
    mesh = run.mesh
    own: dict[Key, dict[str, float]] = {}
    turn = 0
    found = found_rows(kept, mesh.world)
    if mesh.tensor.size > 1:  # all of them have read the same rows of the dense FFN, each others of an expert's
        for counts, by_data in zip(found, found_rows(kept, mesh.data), strict=True):
            counts[0] = by_data[0]
    device = next(run.module.parameters()).device
    full = [(block, number) for block, counts in enumerate(found) for number, n in enumerate(counts)]
    full = [(block, number) for block, number in full if found[block][number] == kept[block].count]
    for readers, sharers, dense in ((mesh.data, mesh.data, True), (mesh.world, mesh.expert_data, False)):
        keys = [(block, number + DENSE) for block, number in full if (number + DENSE == DENSE) is dense]
        wanted = [Wanted(kept[block], k - DENSE, 2 * run.blocks[block].block.hidden_size + 1) for block, k in keys]
        for key, rows in zip(keys, merged_rows(wanted, device, readers), strict=True):
            turn += 1
            if key not in modules:
                continue
            with on_its_own(modules[key]):  # by all that share it, though one of them measures
                mine = turn % sharers.size == sharers.rank
                if mine and (numbers := _numbers(modules[key], key[0], rows, groups)):
                    own[key] = numbers
    result: dict[int, dict[int, dict[str, float]]] = {}
    for part in gather_objects(own, mesh.world):
        for (block, k), numbers in part.items():
            result.setdefault(block, {})[k] = numbers
    return {block: dict(sorted(result[block].items())) for block in sorted(result)}


def block_conflict(found: dict[int, dict[str, float]] | None) -> dict[str, float] | None:
    """One block's numbers for the log: those of its dense FFN, or the means over its experts."""
    if not found:
        return None
    names = dict.fromkeys(name for numbers in found.values() for name in numbers)
    means = {name: _mean([n[name] for n in found.values() if name in n]) for name in names}
    return {**means, "rows": sum(numbers["rows"] for numbers in found.values())}


def _modules(run: RunState, blocks: list[Block]) -> dict[Key, nn.Module]:
    """The modules that are looked at on this rank, by block and expert."""
    modules: dict[Key, nn.Module] = {}
    for i, block in enumerate(blocks):
        if block.mode is BlockMode.WARMUP:
            modules[i, DENSE] = block.dense
            continue
        for number, bank in enumerate(block.banks):
            for local, expert in enumerate(bank.local_experts):
                modules[i, number * bank.num_experts + bank.first_local(run.mesh.expert.rank) + local] = expert
    return modules


def _keep(seen: dict[Key, list[_Call]], key: Key) -> Any:
    def hook(_module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.setdefault(key, []).append(_Call(args[0].detach().reshape(-1, args[0].shape[-1]), output))

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


def _groups(run: RunState, probe: ProbeSet, means: dict[int, Tensor]) -> _Groups:
    """Source and clusters of the sequences of all ranks, by their numbers (collective)."""
    clusters = {handle.index: _clusters_of(handle, means[handle.index]) for handle in run.blocks}
    parts = gather_objects((probe.number.tolist(), probe.domain.tolist(), clusters), run.mesh.data)
    size = max(number for part in parts for number in part[0]) + 1

    def joined(lists: list[list[int]]) -> Tensor:
        table = torch.full((size,), -1)
        for (numbers, *_), values in zip(parts, lists, strict=True):
            for number, value in zip(numbers, values, strict=True):
                if number >= 0:
                    table[number] = value
        return table

    return _Groups(joined([part[1] for part in parts]), {i: joined([part[2][i] for part in parts]) for i in clusters})


def _clusters_of(handle: BlockHandle, means: Tensor) -> list[int]:
    """Cluster of each sequence; -1 while none is known."""
    last = handle.last_clusters
    return [-1] * len(means) if last is None else last.assign(means.cpu()).tolist()


def _numbers(module: nn.Module, block: int, merged: Tensor, groups: _Groups) -> dict[str, float] | None:
    """The numbers of one module from its chosen rows; None where they have no finite gradients."""
    width = merged.shape[1] // 2
    rows, gradient, number = merged[:, :width], merged[:, width:-1], merged[:, -1].long().cpu()
    try:
        gram = ghost_gram(module, rows, gradient)
        # A row without a direction is left out of kappa, which would then be of fewer rows.
        if bool((gram.diagonal() < torch.finfo(gram.dtype).tiny).any()):
            return None
        found = {"rows": float(len(rows)), "kappa": coherence(gram)}
    except MocteError:
        return None
    for prefix, table in (("", groups.source), ("cluster_", groups.cluster[block])):
        try:
            between = conflict(gram, table[number].to(gram.device), unbiased=True)
        except MocteError:
            continue  # all of one group
        named = {"cosine": between.mean_cosine, "negative": between.negative, "R": between.ratio, "Q": between.q}
        found.update({prefix + name: value for name, value in named.items() if math.isfinite(value)})
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
