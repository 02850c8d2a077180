"""From the numbers of a check to a plan that all ranks agree on, and from the plan to changed blocks."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from mocte_ds.config import ClustersConfig
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.state import RunState
from mocte_ds.dist.collectives import max_over_ranks
from mocte_ds.errors import MocteError
from mocte_ds.moe.birth import copy_dense_weights, inherit, set_gate, set_random_gate
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.moe.forward import ForwardState
from mocte_ds.trainability.policy import make_policy
from mocte_ds.zero import UnitState, dense_unit, follow_groups, let_go, on_its_own, whole

CHECKS_IN_A_ROW = 2


@dataclass(frozen=True)
class Change:
    """One step of a plan."""

    kind: str
    """`emergence`, `anneal`, `freeze`, `thaw` or `prefix`."""
    block: int | None
    expert: int | None
    reason: str
    by_hand: bool = False
    """Whether a user called for it."""
    layers: int = 0
    """Of the front that are frozen behind a change of the kind `prefix`."""


def emergence_reason(handle: BlockHandle, reading: BlockReading, config: ClustersConfig, share: float) -> str | None:
    """Why a block's experts emerge at this check, or None (docs/method.md, section 3).

    Side effect: counts the checks in a row that found stable clusters.
    """
    if handle.mode is not BlockMode.WARMUP or share < config.not_before:
        return None
    found = reading.found.detection if reading.found else None
    stable = reading.found.stability if reading.found else None
    good = found is not None and found.found and stable is not None and stable >= config.stability
    handle.streak = handle.streak + 1 if good else 0
    if handle.streak >= CHECKS_IN_A_ROW:
        return (
            f"detected: {found.count} clusters, silhouette {found.silhouette:.2f}, stability {stable:.2f}, "
            f"{handle.streak} checks in a row"
        )
    if share >= config.deadline and reading.rows:
        why = found.reason if found is not None and not found.found else "clusters not stable for two checks in a row"
        return f"deadline: {share:.1%} of the budget is done; {why}"
    return None


def decide_freezing(run: RunState, share: float, step: int) -> list[Change]:
    """What the policy says of each expert that has a new probe; every rank has the same numbers.

    Args:
        run: the run.
        share: part of the budget that was done at the measurement.
        step: of the measurement; an expert that was frozen or thawed since then is left alone.
    """
    config, freeze = run.config, run.config.freeze
    if freeze.policy == "off":
        return []
    policy = make_policy(
        freeze.policy,
        freeze.alpha,
        freeze.beta,
        freeze.checks,
        freeze.until,
        config.seed,
        freeze.after_checks,
        freeze.gamma,
    )
    changes = []
    for handle in run.blocks:
        peers = [e.history[-1].value for e in handle.experts if e.history and e.history[-1].tokens == freeze.rows]
        for k, expert in enumerate(handle.experts):
            if not expert.history or abs(expert.history[-1].share - share) > 1e-12 or expert.changed_at > step:
                continue
            frozen = expert.mode is ExpertMode.FROZEN
            stays = expert.thawed or expert.held or run.in_frozen_front(handle)
            if frozen and stays or expert.annealed_from is not None:
                continue
            decision = policy.decide(
                expert.history, handle.born_share or 0.0, peers, (handle.index, k), frozen, expert.changed_at
            )
            if decision.action != "keep":
                changes.append(Change(decision.action, handle.index, k, decision.reason))
    return changes


def start_annealing(handles: list[BlockHandle], changes: list[Change], anneal: float, share: float) -> list[Change]:
    """Turn freezes into the start of an expert's own learning-rate decay, and finished decays into freezes.

    Returns:
        The changes to apply now; starts are of the kind `anneal`.
    """
    if not anneal:
        return changes
    found = [Change("anneal", c.block, c.expert, c.reason) if c.kind == "freeze" else c for c in changes]
    for handle in handles:
        for k, expert in enumerate(handle.experts):
            if expert.annealed_from is not None and share >= expert.annealed_from + anneal - 1e-9:
                found.append(
                    Change("freeze", handle.index, k, f"annealed since {expert.annealed_from:.1%} of the budget")
                )
    return found


def decide_prefix(run: RunState, share: float, changes: list[Change]) -> list[Change]:
    """Layers of the front that are to freeze at this check, beside what the experts' policy decides.

    Args:
        run: the run, before this check's own changes.
        share: part of the budget that was done at the measurement.
        changes: this check's own; a block that they open is not locked, one that they lock is so at the next check.
    """
    prefix, front = run.config.freeze.prefix, run.registry.front
    if front is None or share > run.config.freeze.until:
        return []
    layers, between = run.frozen_layers, prefix.end - prefix.start
    opened = {run.blocks[c.block].name for c in changes if c.block is not None and c.kind in ("emergence", "thaw")}
    while layers < prefix.layers:
        due = prefix.start + between * layers / max(1, prefix.layers - 1)
        if share < due - 1e-9 or unlocked_blocks(run, layers, opened):
            break
        layers += 1
    if layers == run.frozen_layers:
        return []
    reason = f"{share:.1%} of the budget is done; {layers} of {prefix.layers} layers are frozen from the front"
    return [Change("prefix", None, None, reason, layers=layers)]


def unlocked_blocks(run: RunState, layer: int, opened: Collection[str] = ()) -> list[str]:
    """Blocks in a layer of the front that still have something to train, or are among those that will."""
    front = run.registry.front
    assert front is not None
    return [
        handle.name
        for handle in run.blocks
        if front.layer_of(handle.block) == layer and (handle.mode is not BlockMode.LOCKED or handle.name in opened)
    ]


def apply_changes(run: RunState, changes: list[Change], readings: dict[int, BlockReading]) -> list[dict[str, Any]]:
    """Change modes, routing and the optimizer's partition (collective).

    Each emergence rebuilds the partition for itself, so that the state of one dense FFN at a time is held whole;
    everything else together does so once.

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
            if sampled:
                set_gate(block, run.config, reading.sample())
            else:
                set_random_gate(block, run.config)
            outputs_before[change.block] = _output(run, handle, reading)
            born = _give_dense_state(run, block) if block.kind == "ffn" else {}
            for expert in handle.experts:
                expert.mode, expert.changed_at = ExpertMode.TRAINING, run.step
            handle.born_share = run.share
            handle.refresh_mode()
            _rebuild_partition(run, born)
            facts.append({"gate": "clusters of the sampled features" if sampled else "random: no feature was seen yet"})
        else:
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
        if change.kind == "emergence":
            reading, handle = readings[change.block], run.blocks[change.block]
            fact["clusters"] = reading.found.detection.count if reading.found else None
            change_of_output = _relative_change(outputs_before[change.block], _output(run, handle, reading))
            if all(router.weight == "hard" for router in run.config.routers):
                _require_no_jump(handle.name, change_of_output)
            fact["output_change"] = change_of_output
    return facts


def _give_dense_state(run: RunState, block: Block) -> UnitState:
    """Let a block's `ffn` experts start as copies of the dense FFN: its weights, and what to make their state of."""
    experts = [parameter for bank in block.banks for parameter in bank.local_experts.parameters()]
    with whole([*block.dense.parameters(), *experts], changed=True):
        copy_dense_weights(block)
        return run.optimizer.own_part(inherit(block, run.optimizer.unit_state(dense_unit(block))))


def _rebuild_partition(run: RunState, born: UnitState) -> None:
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
    features, ids, _ = reading.tokens
    if reading.rows < 2 or reading.mean is None:
        return None
    block, training = handle.block, handle.block.training
    block.eval()
    try:
        like = next(block.dense.parameters())
        with on_its_own(block), run.context.running(ForwardState(ids)):
            return block(features.to(like.device, like.dtype)).float()
    finally:
        block.train(training)


def _relative_change(before: torch.Tensor | None, after: torch.Tensor | None) -> float | None:
    """Largest change of an output at emergence over the largest output, all ranks together."""
    if before is None or after is None:
        return None
    change = (after - before).abs().max() if before.numel() else torch.zeros(())
    scale = before.abs().max() if before.numel() else torch.zeros(())
    change, scale = float(max_over_ranks(change)), float(max_over_ranks(scale))
    return change / scale if scale > 0 else change


def _require_no_jump(name: str, change: float | None) -> None:
    """With a hard weight nothing but rounding may change at emergence.

    Raises:
        MocteError: the function jumped, so an expert is not the copy that it should be.
    """
    if change is not None and change > 0.05:
        raise MocteError(
            f"emergence changed the output of {name} by {change:.1%} of its largest value; the experts are not copies "
            "of the dense FFN. The run stops because training would go on from another function."
        )
