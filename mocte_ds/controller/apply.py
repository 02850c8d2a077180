"""Carries a plan out: changes modes, routing and the optimizer's partition."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mocte_ds.controller.birth import copy_buffers, copy_dense_weights, draw_bypasses, inherit, redraw_units, set_gate
from mocte_ds.controller.decide import Change
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import max_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, ExpertMode
from mocte_ds.moe.forward import ForwardState
from mocte_ds.zero import (
    UnitState,
    allocate_experts,
    dense_unit,
    expert_unit,
    follow_groups,
    follow_mode,
    let_go,
    on_its_own,
    whole,
)


def apply_changes(
    run: RunState, changes: Sequence[Change], readings: Mapping[int, BlockReading]
) -> list[dict[str, Any]]:
    """Change modes, routing and the optimizer's partition (collective).

    Each emergence rebuilds the partition on its own, so that the full state of only one dense FFN is held at a time;
    everything else shares one rebuild.

    Returns:
        Facts for the event of each change.
    """
    facts: list[dict[str, Any]] = []
    outputs_before = {}
    let_go(run.module)
    for change in changes:
        if change.block is None:
            run.frozen_layers = change.layers
            facts.append({"layers": change.layers})
            continue
        handle = run.blocks[change.block]
        block = handle.block
        if change.kind == "emergence":
            reading = readings[change.block]
            sampled = reading.basis is not None
            set_gate(block, run.config, run.mesh, reading.sample() if sampled else None)
            outputs_before[change.block] = _output(run, handle, reading)
            born = _give_birth(run, block)
            for expert in handle.experts:
                expert.mode, expert.changed_at = ExpertMode.TRAINING, run.step
            handle.born_share = run.share
            handle.refresh_mode()
            _rebuild_partition(run, born)
            facts.append({"gate": "clusters of the sampled features" if sampled else "random: no feature was seen yet"})
        else:
            assert change.expert is not None  # only an emergence is of a whole block
            expert = handle.experts[change.expert]
            if change.kind == "anneal":
                expert.annealed_from = run.share
                facts.append({})
                continue
            expert.annealed_from = None
            frozen = change.kind == "freeze"
            expert.mode = ExpertMode.FROZEN if frozen else ExpertMode.TRAINING
            expert.changed_at, expert.held = run.step, frozen and change.by_hand
            expert.thawed = expert.thawed or not (frozen or change.by_hand)
            facts.append({})
        handle.refresh_mode()
    _rebuild_partition(run, {})
    for change, fact in zip(changes, facts, strict=True):
        if change.kind == "emergence" and change.block is not None:
            reading, handle = readings[change.block], run.blocks[change.block]
            fact["clusters"] = reading.found.detection.count if reading.found else None
            change_of_output = _relative_change(
                outputs_before[change.block], _output(run, handle, reading), run.mesh.world
            )
            hard = all(router.weight in ("hard", "gain") for router in run.config.routers)
            if hard and not run.config.expert.redraw:
                _require_no_jump(handle.name, change_of_output)
            fact["output_change"] = change_of_output
    return facts


def _give_birth(run: RunState, block: Block) -> UnitState:
    """Memory and weights of a block's experts, and the dense FFN's state, from which that of `ffn` experts is made."""
    allocate_experts(block)
    experts = [parameter for bank in block.banks for parameter in bank.local_experts.parameters()]
    of_dense = block.kind == "ffn" or run.config.expert.redraw > 0
    with whole([*(block.dense.parameters() if of_dense else ()), *experts], changed=True):
        if block.kind == "lora":
            for parameter in experts:
                parameter.detach().zero_()  # a run that has gone back to an earlier checkpoint may have trained it
            draw_bypasses(block, run.config, run.mesh.expert.rank)
        else:
            copy_dense_weights(block)
        copy_buffers(block)
        drawn = redraw_units(block, run.config, run.mesh.expert.rank)
        if block.kind == "lora" or run.config.expert.redraw == 1.0:
            return {}  # nothing of the dense FFN is in them: their moments start anew
        return run.optimizer.own_part(inherit(block, run.optimizer.unit_state(dense_unit(block)), drawn))


def _rebuild_partition(run: RunState, born: UnitState) -> None:
    """Let the memory of the blocks' parts, and then the optimizer, follow from the modes (collective)."""
    for handle in run.blocks:
        follow_mode(handle.block)
    trainable = run.trainable_units()
    if run.registry.front is not None:
        run.registry.front.run_without_graph(run.module, run.frozen_layers)
    for unit in run.registry.units.values():
        if unit.name == "trunk":
            continue
        for parameter in unit.parameters:
            parameter.requires_grad_(unit.name in trainable)
            if unit.name not in trainable:
                parameter.grad = None
    groups = run.registry.groups(trainable)
    if run.optimizer.changed_by(groups):
        count = len(run.optimizer.optimizer.param_groups)
        sources = run.optimizer.regroup(groups, born)
        follow_groups(run.scheduler, count, sources)


@torch.no_grad()
def _output(run: RunState, handle: BlockHandle, reading: BlockReading) -> torch.Tensor | None:
    """The block's output on this rank's sampled features."""
    rows = reading.tokens
    if reading.rows < 2 or reading.mean is None:
        return None
    block, training = handle.block, handle.block.training
    block.eval()
    try:
        like = next(block.dense.parameters())
        with on_its_own(block), run.context.running(ForwardState(rows.ids, previous=rows.before)):
            return block(rows.features.to(like.device, like.dtype)).float()
    finally:
        block.train(training)


def _relative_change(before: torch.Tensor | None, after: torch.Tensor | None, axis: Axis) -> float | None:
    """Largest change of an output at emergence over the largest output, all ranks together."""
    if before is None or after is None:
        return None
    change = (after - before).abs().max() if before.numel() else torch.zeros(())
    scale = before.abs().max() if before.numel() else torch.zeros(())
    change, scale = float(max_over_ranks(change, axis)), float(max_over_ranks(scale, axis))
    return change / scale if scale > 0 else change


def _require_no_jump(name: str, change: float | None) -> None:
    """With a hard weight nothing but rounding may change at emergence.

    Raises:
        MocteError: the function changed, so an expert is not the copy that it should be.
    """
    if change is not None and change > 0.05:
        raise MocteError(
            f"emergence changed the output of {name} by {change:.1%} of its largest value; the experts are not copies "
            "of the dense FFN. The run stops because training would go on from another function."
        )


def set_rates(run: RunState) -> None:
    """Tell the optimizer the factor of the learning rate that annealing experts get at the next step."""
    anneal = run.config.freeze.anneal
    run.optimizer.rate_factors = {
        expert_unit(handle.block, k): max(0.0, 1.0 - (run.share - expert.annealed_from) / anneal)
        for handle in run.blocks
        for k, expert in enumerate(handle.experts)
        if expert.annealed_from is not None
    }
