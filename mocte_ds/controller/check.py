"""One check, from its measurements at one optimizer step to the event that tells of it at a later one."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mocte_ds.controller.decide import ClusterStatus
from mocte_ds.controller.flops import FlopCount, of_all_ranks
from mocte_ds.controller.gradients import block_conflict, read_conflict
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.measurements import finish_readings, read_blocks
from mocte_ds.controller.progress import Progress, ProgressFacts
from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.run_state import RunState
from mocte_ds.controller.search import ClusterSearch
from mocte_ds.controller.trainability import measure_trainability


@dataclass(frozen=True)
class Looks:
    """What one check looks at besides what every check does."""

    read: list[BlockHandle]
    """Blocks whose features are read: spectrum and clusters."""
    rolled_back: list[BlockHandle]
    """Blocks whose experts' progress is measured, if they have any."""
    conflict: bool
    """Whether the conflict of gradients is measured, in all blocks."""


@dataclass
class Check:
    """What was measured; the same on all ranks, apart from the rows of the readings."""

    step: int
    """Optimizer step of the measurements."""
    share: float
    """Share of the budget that was done then."""
    readings: dict[int, BlockReading]
    search: ClusterSearch | None = None
    """Still going on; None when its results are in the readings."""
    progress: ProgressFacts = field(default_factory=ProgressFacts)
    conflict: dict[int, dict[int, dict[str, float]]] = field(default_factory=dict)
    """By block and expert, see :func:`read_conflict`; empty at most checks."""
    sampled: dict[int, list[int]] = field(default_factory=dict)
    """Rows found of each expert, by block; an expert with fewer than `freeze.rows` was not measured."""
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    """By part, all ranks together; see :class:`FlopCount`."""

    @classmethod
    def measure(cls, run: RunState, progress: Progress, looks: Looks, in_background: bool) -> "Check":
        """Read everything that a decision may need (collective).

        Args:
            run: the run.
            progress: the probe set and what it remembers.
            looks: what is due.
            in_background: look for clusters in a thread.
        """
        with FlopCount() as spectrum:
            readings, search = read_blocks(run, run.blocks, in_background, looks.read)
        check = cls(run.step, run.share, readings, search)
        found = check.progress = progress.measure(run, looks.rolled_back)
        trained = measure_trainability(run, found)
        check.sampled = trained.sampled
        check.seconds["trainability"], check.bytes["trainability"] = trained.seconds, trained.bytes
        if looks.conflict:
            started = time.perf_counter()
            with FlopCount() as conflicts:
                check.conflict = read_conflict(run, progress.probe)
            found.flops += conflicts.total
            found.tokens = progress.probe.count()
            found.seconds += time.perf_counter() - started
            found.passes += 2  # forward, and the half of a backward pass that costs the same
        check.seconds["progress"], check.bytes["progress"] = found.seconds, found.bytes
        own = {"spectrum": spectrum.total, "trainability": trained.flops, "progress": found.flops}
        check.flops = of_all_ranks(own, run.mesh.world)
        return check

    def finish(self, run: RunState) -> None:
        """Wait for the search and take in what it found (collective)."""
        started = time.perf_counter()
        finish_readings(run, self.readings, self.search)
        self.search = None
        self.flops["clusters"] = sum(reading.found.flops for reading in self.readings.values() if reading.found)
        self.seconds["waiting"] = self.seconds.get("waiting", 0.0) + time.perf_counter() - started

    def cluster_status(self) -> dict[int, ClusterStatus]:
        """What decisions read from the search, by block."""
        return {
            index: ClusterStatus(
                reading.rows,
                reading.found.detection if reading.found else None,
                reading.found.stability if reading.found else None,
            )
            for index, reading in self.readings.items()
        }

    def event(self, run: RunState) -> dict[str, Any]:
        """The check's line in the log."""
        parts = ("spectrum", "clusters")
        readings = self.readings.values()
        seconds = {part: sum(reading.seconds[part] for reading in readings) for part in parts}
        moved = {part: sum(reading.bytes[part] for reading in readings) for part in parts}
        return {
            "event": "check",
            "measured_at": self.step,
            "seconds": {**seconds, **self.seconds},
            "beside": {"clusters": sum(reading.found.seconds for reading in readings if reading.found)},
            "bytes": {**moved, **self.bytes},
            "flops": self.flops,
            "probe": {"tokens": self.progress.tokens, "passes": self.progress.passes},
            "blocks": [self._block(run, index) for index in range(len(run.blocks))],
        }

    def _block(self, run: RunState, index: int) -> dict[str, Any]:
        handle, found = run.blocks[index], self.progress
        conflict, progress = self.conflict.get(index, {}), found.progress.get(index)
        sampled = self.sampled.get(index, [0] * len(handle.experts))
        experts = [
            {
                "expert": k,
                "mode": str(expert.mode),
                "tokens": expert.tokens,
                "lambda": expert.trainability,
                "rows": expert.rows(self.step),
                "sampled": sampled[k],
                "kappa": conflict.get(k, {}).get("kappa"),
                "progress": progress[k] if progress else None,
            }
            for k, expert in enumerate(handle.experts)
        ]
        return {
            "block": index,
            "name": handle.name,
            "mode": str(handle.mode),
            **self.readings[index].facts(run.domain_names),
            "churn": found.churn.get(index),
            "probe_load": found.load.get(index),
            "imbalance": found.imbalance.get(index),
            "conflict": block_conflict(conflict),
            "experts": experts,
        }

    def state_dict(self, run: RunState) -> dict[str, Any]:
        """Plain values of what all ranks have (collective: waits for the end of the search)."""
        self.finish(run)
        return {
            "step": self.step,
            "share": self.share,
            "readings": {index: reading.state_dict() for index, reading in self.readings.items()},
            "progress": vars(self.progress),
            "conflict": self.conflict,
            "sampled": self.sampled,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "flops": self.flops,
        }

    def own_state_dict(self) -> dict[int, Any]:
        """Plain values of what this rank has."""
        return {index: reading.own_state_dict() for index, reading in self.readings.items()}

    @classmethod
    def restored(cls, state: Mapping[str, Any], own: Mapping[int, Any], device: torch.device) -> "Check":
        """A check from what :meth:`state_dict` and :meth:`own_state_dict` returned; rows go to ``device``."""
        readings = {i: BlockReading.restored(values, own[i], device) for i, values in state["readings"].items()}
        progress = ProgressFacts(**state["progress"])
        return cls(**{**state, "readings": readings, "progress": progress})
