"""Decisions of a check on hand-made numbers: what emerges, freezes, thaws and anneals, and when."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mocte_ds.clusters import Detection
from mocte_ds.config import ClustersConfig, MocteConfig
from mocte_ds.controller.decide import (
    CHECKS_IN_A_ROW,
    BlockStatus,
    Change,
    ClusterStatus,
    RunStatus,
    decide,
    decide_emergence,
    decide_freezing,
    decide_prefix,
    start_annealing,
    unlocked_blocks,
)
from mocte_ds.controller.handles import ExpertHandle
from mocte_ds.moe.block import BlockMode, ExpertMode
from mocte_ds.trainability import Probe

ROWS = 256
SEEN_NOTHING = ClusterStatus(rows=0, detection=None, stability=None)
DONE = [100.0, 80.0, 60.0, 20.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
"""lambda of an expert that the default policy freezes: far under its peak, and flat."""
LEARNING = [100.0, 98.0, 97.0, 95.0, 96.0, 94.0, 92.0, 93.0, 91.0, 90.0, 89.0, 90.0]


def detection(found: bool = True, count: int = 4, reason: str = "") -> Detection:
    return Detection(
        labels=torch.arange(64) % count,
        count=count,
        noise=0.0,
        largest=1 / count,
        silhouette=0.6,
        eps=0.3,
        sensitivity=[],
        found=found,
        reason=reason,
    )


def clusters(stability: float | None = 0.9, **changes: Any) -> ClusterStatus:
    return ClusterStatus(rows=512, detection=detection(**changes), stability=stability)


def config(**freeze: Any) -> MocteConfig:
    return MocteConfig.from_dict({"modules": "x", "num_experts": 2, "freeze": {"rows": ROWS, **freeze}})


def expert(values: Sequence[float], mode: ExpertMode = ExpertMode.TRAINING, **state: Any) -> ExpertHandle:
    """An expert with a probe every 0.8 % of the budget, from 10 % on."""
    history = [Probe(10 + i, 0.1 + 0.008 * i, value, ROWS, 1.0) for i, value in enumerate(values)]
    return ExpertHandle(mode=mode, history=history, **{"changed_at": 9, **state})


def block(*experts: ExpertHandle, index: int = 0, **state: Any) -> BlockStatus:
    mode = BlockMode.SPECIALISING if experts else BlockMode.WARMUP
    return BlockStatus(index, f"layers.{index}.mlp", **{"mode": mode, "experts": experts, "born_share": 0.1, **state})


def run(*blocks: BlockStatus, **state: Any) -> RunStatus:
    """A run at the newest probe of its experts."""
    newest = [e.history[-1] for b in blocks for e in b.experts if e.history]
    share, step = (newest[0].share, newest[0].step) if newest else (0.5, 500)
    return RunStatus(blocks, **{"share": share, "step": step, "now": share, **state})


def kinds(changes: Sequence[Change]) -> list[tuple[str, int | None, int | None]]:
    return [(change.kind, change.block, change.expert) for change in changes]


# ---- emergence -----------------------------------------------------------------------------------------------------


def emergence(sequence: Sequence[ClusterStatus], first: float = 0.03, **changes: float) -> tuple[int | None, list[int]]:
    """The check at which a block emerges (None: never), and the streak after each check, 0.8 % of the budget apart."""
    streaks, settings = [0], replace(ClustersConfig(), **{"deadline": 1.0, **changes})
    for number, found in enumerate(sequence):
        status = block(streak=streaks[-1])
        reason, streak = decide_emergence(status, found, settings, first + 0.008 * number)
        streaks.append(streak)
        if reason:
            return number, streaks[1:]
    return None, streaks[1:]


def test_emergence_needs_stable_clusters_at_checks_in_a_row() -> None:
    good, unstable, none = clusters(), clusters(stability=0.59), clusters(found=False, reason="one giant cluster")
    assert CHECKS_IN_A_ROW == 2
    assert emergence([good, good]) == (1, [1, 2])
    assert emergence([good, unstable, good, good]) == (3, [1, 0, 1, 2])
    assert emergence([good, none, good, SEEN_NOTHING, good, good]) == (5, [1, 0, 1, 0, 1, 2])
    assert emergence([unstable, none, SEEN_NOTHING] * 4)[0] is None
    assert emergence([clusters(stability=0.6)] * 2)[0] == 1  # the bound itself is stable


def test_a_stability_that_is_missing_or_not_a_number_is_not_stable() -> None:
    for bad in (None, math.nan, -math.inf):
        assert emergence([clusters(stability=bad)] * 5) == (None, [0] * 5)


def test_nothing_emerges_before_its_time_and_checks_before_it_do_not_count() -> None:
    good = clusters()
    assert emergence([good] * 6, first=0.0, not_before=0.02) == (4, [0, 0, 0, 1, 2])


def test_the_deadline_says_what_was_missing() -> None:
    settings = ClustersConfig()
    late = settings.deadline + 0.001
    giant = clusters(found=False, reason="one cluster holds 90% of the points")
    reason, _ = decide_emergence(block(), giant, settings, late)
    assert reason is not None and reason.startswith("deadline: 10.1%") and "holds 90%" in reason
    reason, _ = decide_emergence(block(), clusters(stability=0.1), settings, late)
    assert reason is not None and "not stable" in reason
    assert decide_emergence(block(), giant, settings, settings.deadline - 0.001)[0] is None
    # A block that has seen nothing has nothing to make a gate of.
    assert decide_emergence(block(), SEEN_NOTHING, settings, late) == (None, 0)


def test_a_block_emerges_once() -> None:
    for mode in (BlockMode.SPECIALISING, BlockMode.LOCKED):
        status = block(mode=mode, streak=2)
        assert decide_emergence(status, clusters(), ClustersConfig(), 0.5) == (None, 2)


# ---- freezing and thawing ------------------------------------------------------------------------------------------


def test_the_one_that_is_done_freezes() -> None:
    status = run(block(expert(DONE), expert(LEARNING)), block(expert(LEARNING), expert(DONE), index=1))
    assert kinds(decide_freezing(status, config())) == [("freeze", 0, 0), ("freeze", 1, 1)]
    assert decide_freezing(status, config(policy="off")) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_probe_that_is_not_a_number_decides_nothing(bad: float) -> None:
    status = run(block(expert([*DONE, bad]), expert([*DONE, 4.0])))
    assert kinds(decide_freezing(status, config())) == [("freeze", 0, 1)]
    # One in the past is left out, as if it had not been measured.
    status = run(block(expert([*DONE[:3], bad, *DONE[3:]]), expert([*LEARNING, 90.0])))
    assert kinds(decide_freezing(status, config())) == [("freeze", 0, 0)]


def test_an_expert_without_tokens_is_left_alone() -> None:
    """It has no probe, or none of this check; its neighbours are decided on."""
    starved = expert(DONE[:-1])  # no rows since the last check
    status = run(block(expert(DONE), starved, ExpertHandle(mode=ExpertMode.TRAINING)))
    assert kinds(decide_freezing(status, config())) == [("freeze", 0, 0)]


def test_other_numbers_of_rows_are_not_compared() -> None:
    """lambda over n falls with n: more rows must not look like an expert that is done."""
    few = expert([100.0] * 8)
    few.history = [replace(probe, tokens=16) for probe in few.history]
    few.history += [Probe(18 + i, 0.164 + 0.008 * i, 5.0, ROWS, 1.0) for i in range(4)]
    assert decide_freezing(run(block(few)), config()) == []


def test_an_expert_that_changed_since_the_measurement_is_left_alone() -> None:
    status = run(block(expert(DONE, changed_at=21), expert(DONE, changed_at=22)))
    assert status.step == 21
    # Frozen or thawed at the very step of the measurement counts as before it; one step later does not.
    assert kinds(decide_freezing(status, config(checks=1, after_checks=1))) == []
    status = run(block(expert(DONE, changed_at=9), expert(DONE, changed_at=22)))
    assert kinds(decide_freezing(status, config())) == [("freeze", 0, 0)]


def test_thawing_is_for_those_whom_no_hand_no_thaw_and_no_front_holds() -> None:
    back = [100.0, 80.0, 60.0, 5.0, 4.0, 4.0, 90.0, 90.0, 90.0, 90.0, 90.0, 90.0]
    frozen = [
        expert(back, ExpertMode.FROZEN, changed_at=15, **state) for state in ({}, {"held": True}, {"thawed": True})
    ]
    assert kinds(decide_freezing(run(block(*frozen)), config())) == [("thaw", 0, 0)]
    in_front = run(block(*frozen, layer=1), has_front=True, frozen_layers=2)
    assert decide_freezing(in_front, config()) == []
    beyond = run(block(*frozen, layer=2), has_front=True, frozen_layers=2)
    assert kinds(decide_freezing(beyond, config())) == [("thaw", 0, 0)]
    assert decide_freezing(run(block(*frozen)), config(policy="paper")) == []  # no thaw in this rule


# ---- annealing -----------------------------------------------------------------------------------------------------


def test_annealing_stands_between_decision_and_freeze() -> None:
    start = run(block(expert(DONE), expert(LEARNING)))
    decided = decide_freezing(start, config())
    assert kinds(start_annealing(start, decided, 0.05)) == [("anneal", 0, 0)]
    assert start_annealing(start, decided, 0.0) == decided
    begun = expert(DONE, annealed_from=start.share)
    for later, expected in ((0.049, []), (0.05, [("freeze", 0, 0)]), (0.2, [("freeze", 0, 0)])):
        status = run(block(begun, expert(LEARNING)), now=start.share + later)
        assert decide_freezing(status, config()) == []  # decided already
        assert kinds(start_annealing(status, [], 0.05)) == expected


# ---- the front -----------------------------------------------------------------------------------------------------


def front_config(layers: int) -> MocteConfig:
    return config(prefix={"layers": layers, "start": 0.3, "end": 0.6})


def test_the_front_freezes_by_its_schedule() -> None:
    locked = [block(index=i, layer=i, mode=BlockMode.LOCKED) for i in range(4)]
    for share, layers in ((0.29, 0), (0.3, 1), (0.39, 1), (0.4, 2), (0.5, 3), (0.6, 4), (0.8, 4)):
        changes = decide_prefix(run(*locked, share=share, has_front=True), front_config(4), [])
        assert [change.layers for change in changes] == ([layers] if layers else []), share
    # After `until` nothing freezes, and what is frozen is not frozen again.
    assert decide_prefix(run(*locked, share=0.95, has_front=True), front_config(4), []) == []
    assert decide_prefix(run(*locked, share=0.5, has_front=True, frozen_layers=3), front_config(4), []) == []
    assert decide_prefix(run(*locked, share=0.5), front_config(4), []) == []


def test_the_front_waits_for_a_block_that_trains() -> None:
    blocks = [block(index=0, layer=0, mode=BlockMode.LOCKED), block(expert(LEARNING), index=1, layer=1)]
    status = run(*blocks, share=0.8, has_front=True)
    assert [change.layers for change in decide_prefix(status, front_config(2), [])] == [1]
    assert unlocked_blocks(blocks, 0) == [] and unlocked_blocks(blocks, 1) == ["layers.1.mlp"]
    # A thaw of the same check opens the block; a freeze of the same check locks it only at the next one.
    assert decide_prefix(status, front_config(2), [Change("thaw", 0, 0, "")]) == []
    waiting = decide_prefix(status, front_config(2), [Change("freeze", 1, 0, "")])
    assert [change.layers for change in waiting] == [1]


# ---- all of it -----------------------------------------------------------------------------------------------------


def test_a_plan_holds_everything_and_changes_nothing() -> None:
    warm = block(index=1, streak=1)
    status = run(block(expert(DONE), expert(LEARNING)), warm)
    before = repr(status)
    plan = decide(status, {0: clusters(), 1: clusters()}, config())
    assert kinds(plan.changes) == [("emergence", 1, None), ("freeze", 0, 0)]
    assert plan.streaks == {0: 0, 1: 2}
    assert repr(status) == before
    assert decide(status, {0: clusters(), 1: clusters()}, config()) == plan
