"""Decisions of a check: numbers in, changes out. Nothing here touches a model, another process or a file."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mocte_ds.clusters import Detection
from mocte_ds.config import ClustersConfig, MocteConfig
from mocte_ds.controller.handles import ExpertHandle
from mocte_ds.moe.block import BlockMode, ExpertMode
from mocte_ds.registry import OFF
from mocte_ds.trainability import Policy

CHECKS_IN_A_ROW = 2
"""Checks that must find stable clusters before a block's experts emerge."""


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
    """For the kind `prefix`: number of layers of the front that are frozen after the change."""


@dataclass(frozen=True)
class BlockStatus:
    """A block as the decisions see it."""

    index: int
    name: str
    """Path in the model."""
    mode: BlockMode
    experts: Sequence[ExpertHandle]
    born_share: float | None = None
    """Share of the budget at emergence; None before."""
    streak: int = 0
    """Number of checks in a row, up to the last one, that found stable clusters."""
    layer: int | None = None
    """Layer of the front that the block lies in; None if the front cannot be frozen or does not contain the block."""


@dataclass(frozen=True)
class RunStatus:
    """A run as the decisions see it, between a check's measurements and its changes."""

    blocks: Sequence[BlockStatus]
    share: float
    """Share of the budget that was done at the measurements."""
    step: int
    """Optimizer step of the measurements; an expert that was frozen or thawed after it is left alone."""
    now: float
    """Share of the budget that is done now."""
    has_front: bool = False
    """Whether layers of the front may freeze."""
    frozen_layers: int = 0
    """Layers of the front that are frozen."""


@dataclass(frozen=True)
class ClusterStatus:
    """What a check found in one block's documents."""

    rows: int
    """Token features that were sampled; 0: the block has seen nothing."""
    detection: Detection | None
    stability: float | None
    """Agreement with the last check; None where there is nothing to compare."""


@dataclass(frozen=True)
class Plan:
    """What a check changes."""

    changes: list[Change] = field(default_factory=list)
    streaks: dict[int, int] = field(default_factory=dict)
    """For each block in warm-up, the number of checks in a row that found stable clusters, this one included."""


def decide(status: RunStatus, clusters: Mapping[int, ClusterStatus], config: MocteConfig) -> Plan:
    """The whole plan of a check; every rank has the same numbers and makes the same plan.

    Args:
        status: of the run.
        clusters: by block.
        config: the "mocte" block.
    """
    plan = Plan()
    for block in status.blocks:
        reason, streak = decide_emergence(block, clusters[block.index], config.clusters, status.share)
        plan.streaks[block.index] = streak
        if reason:
            plan.changes.append(Change("emergence", block.index, None, reason))
    freezes = decide_freezing(status, config)
    plan.changes.extend(start_annealing(status, freezes, config.freeze.anneal))
    plan.changes.extend(decide_prefix(status, config, plan.changes))
    return plan


def decide_emergence(
    block: BlockStatus, found: ClusterStatus, config: ClustersConfig, share: float
) -> tuple[str | None, int]:
    """Why a block's experts emerge at this check, or None; and the streak (docs/method.md, section 3)."""
    if block.mode is not BlockMode.WARMUP or share < config.not_before:
        return None, block.streak
    detection, stable = found.detection, found.stability
    good = detection is not None and detection.found and stable is not None and stable >= config.stability
    streak = block.streak + 1 if good else 0
    if detection is not None and streak >= CHECKS_IN_A_ROW:
        reason = (
            f"detected: {detection.count} clusters, silhouette {detection.silhouette:.2f}, stability {stable:.2f}, "
            f"{streak} checks in a row"
        )
        return reason, streak
    if share >= config.deadline and found.rows:
        missing = detection.reason if detection is not None and not detection.found else None
        why = missing or "clusters not stable for two checks in a row"
        return f"deadline: {share:.1%} of the budget is done; {why}", streak
    return None, streak


def decide_freezing(status: RunStatus, config: MocteConfig) -> list[Change]:
    """What the policy says about each expert that has a new probe."""
    freeze = config.freeze
    if freeze.policy == OFF:
        return []
    policy = Policy(freeze, config.seed)
    changes = []
    for block in status.blocks:
        front = block.layer is not None and block.layer < status.frozen_layers
        peers = [e.history[-1].value for e in block.experts if e.history and e.history[-1].tokens == freeze.rows]
        for k, expert in enumerate(block.experts):
            new = bool(expert.history) and abs(expert.history[-1].share - status.share) <= 1e-12
            if not new or expert.changed_at > status.step or expert.annealed_from is not None:
                continue
            frozen = expert.mode is ExpertMode.FROZEN
            if frozen and (expert.thawed or expert.held or front):
                continue
            who, born = (block.index, k), block.born_share or 0.0
            decision = policy.decide(expert.history, born, peers, who, frozen, expert.changed_at)
            if decision.action != "keep":
                changes.append(Change(decision.action, block.index, k, decision.reason))
    return changes


def start_annealing(status: RunStatus, changes: list[Change], anneal: float) -> list[Change]:
    """Turn freezes into the start of an expert's own learning-rate decay, and finished decays into freezes.

    Returns:
        The changes to apply now; starts are of the kind `anneal`.
    """
    if not anneal:
        return changes
    found = [Change("anneal", c.block, c.expert, c.reason) if c.kind == "freeze" else c for c in changes]
    for block in status.blocks:
        for k, expert in enumerate(block.experts):
            start = expert.annealed_from
            if start is not None and status.now >= start + anneal - 1e-9:
                found.append(Change("freeze", block.index, k, f"annealed since {start:.1%} of the budget"))
    return found


def decide_prefix(status: RunStatus, config: MocteConfig, changes: Sequence[Change]) -> list[Change]:
    """The change that freezes further layers of the front at this check, if any.

    Args:
        status: of the run, before this check's own changes.
        config: the "mocte" block.
        changes: those of this check; a block that they open does not count as locked, one that they lock counts from
            the next check on.
    """
    prefix = config.freeze.prefix
    if not status.has_front or status.share > config.freeze.until:
        return []
    layers, between = status.frozen_layers, prefix.end - prefix.start
    opened = {c.block for c in changes if c.block is not None and c.kind in ("emergence", "thaw")}
    while layers < prefix.layers:
        due = prefix.start + between * layers / max(1, prefix.layers - 1)
        if status.share < due - 1e-9 or unlocked_blocks(status.blocks, layers, opened):
            break
        layers += 1
    if layers == status.frozen_layers:
        return []
    reason = f"{status.share:.1%} of the budget is done; {layers} of {prefix.layers} layers are frozen from the front"
    return [Change("prefix", None, None, reason, layers=layers)]


def unlocked_blocks(blocks: Sequence[BlockStatus], layer: int, opened: Collection[int] = ()) -> list[str]:
    """Names of the blocks in a layer of the front that still train something, or are among ``opened``."""
    return [
        block.name
        for block in blocks
        if block.layer == layer and (block.mode is not BlockMode.LOCKED or block.index in opened)
    ]
