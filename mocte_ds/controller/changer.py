"""Applies plans that all ranks agree on, proves that they hold, and reports them."""

from collections.abc import Mapping, Sequence

from mocte_ds.controller.apply import apply_changes
from mocte_ds.controller.decide import Change
from mocte_ds.controller.events import Events
from mocte_ds.controller.flops import FlopCount, of_all_ranks
from mocte_ds.controller.progress import Progress
from mocte_ds.controller.proof import Proof
from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import gather_objects, require_same


class Changer:
    """The only way from a plan to a changed run."""

    def __init__(self, run: RunState, proof: Proof, progress: Progress, events: Events) -> None:
        """Of a run and what watches it."""
        self._run, self._proof, self._progress, self._events = run, proof, progress, events

    def apply(
        self,
        changes: Sequence[Change],
        readings: Mapping[int, BlockReading],
        spent: Mapping[str, int] | None = None,
    ) -> None:
        """Carry out a plan in one rebuild of the partition (collective).

        Args:
            changes: the plan; not empty.
            readings: of the blocks that emerge.
            spent: FLOPs that the readings cost on this rank, by part, where no check's event tells of them.

        Raises:
            RankMismatch: the ranks have different plans; before anything is changed.
            MocteError: a frozen weight has moved, or an emergence changed the function.
        """
        run, world = self._run, self._run.mesh.world
        require_same([str(change) for change in changes], f"plan of changes after step {run.step}", world)
        emerging = {c.block for c in changes if c.kind == "emergence" and c.block is not None}
        self._events.emit_projections({i: reading for i, reading in readings.items() if i in emerging})
        self._proof.require_frozen_unmoved(run)
        before = gather_objects(run.optimizer.optimizer_bytes(), world)
        with FlopCount() as births:
            facts = apply_changes(run, changes, readings)
        self._proof.begin(run)
        after = gather_objects(run.optimizer.optimizer_bytes(), world)
        with FlopCount() as looking:
            self._progress.remember_routes(run, emerging)
            self._progress.remember_new(run)
        own = {"spectrum": 0, "clusters": births.total, "progress": looking.total}
        facts[0]["flops"] = of_all_ranks({part: n + (spent or {}).get(part, 0) for part, n in own.items()}, world)
        sizes = {
            "optimizer_bytes_before": sum(before),
            "optimizer_bytes_after": sum(after),
            "optimizer_bytes_by_rank_before": before,
            "optimizer_bytes_by_rank_after": after,
        }
        for change, fact in zip(changes, facts, strict=True):
            event = {"event": change.kind, "block": change.block, "reason": change.reason, **fact}
            if change.block is not None:
                handle = run.blocks[change.block]
                event["name"] = handle.name
                if change.expert is not None:
                    event.update(expert=change.expert, **{"lambda": handle.experts[change.expert].trainability})
            self._events.emit({**event, **sizes})
