"""Emergences outside of checks: on a user's call, and before the first step for experts from scratch."""

from collections.abc import Sequence

from mocte_ds.controller.changer import Changer
from mocte_ds.controller.decide import Change
from mocte_ds.controller.flops import FlopCount
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.measurements import finish_readings, read_blocks
from mocte_ds.controller.run_state import RunState
from mocte_ds.moe.block import BlockMode
from mocte_ds.moe.keys import key_class


def emerge_now(
    run: RunState, changer: Changer, handles: Sequence[BlockHandle], reason: str, by_hand: bool = False
) -> None:
    """Turn on the experts of some blocks in warm-up (collective, between two steps).

    Args:
        run: the run.
        changer: of the run.
        handles: the blocks.
        reason: for the events.
        by_hand: whether a user called for it.
    """
    with FlopCount() as spectrum:
        readings, search = read_blocks(run, list(handles), in_background=False)
    finish_readings(run, readings, search)
    # All ranks know what the search has cost all of them.
    searched = sum(r.found.flops for r in readings.values() if r.found) if run.mesh.world.rank == 0 else 0
    spent = {"spectrum": spectrum.total, "clusters": searched}
    changes = [Change("emergence", handle.index, None, reason, by_hand=by_hand) for handle in handles]
    changer.apply(changes, readings, spent)


def born_at_once(run: RunState) -> list[BlockHandle]:
    """Blocks whose experts emerge before the first step: deadline 0, and routers that need no sampled features."""
    clusters = run.config.clusters
    if run.step or not run.config.auto or clusters.deadline > 0 or clusters.not_before > 0:
        return []
    if any(key_class(router.kind).of_sample for router in run.config.routers):
        return []
    return [handle for handle in run.blocks if handle.mode is BlockMode.WARMUP]
