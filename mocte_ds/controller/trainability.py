"""Measures the trainability of every expert from the rows that it was sent since the last check."""

import time

from mocte_ds.controller.handles import ExpertHandle
from mocte_ds.controller.progress import ProgressFacts
from mocte_ds.controller.state import RunState
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, ExpertMode
from mocte_ds.trainability import Probe, top_eigenpair
from mocte_ds.zero import expert_unit, let_go, on_its_own

MIN_EXPERT_ROWS = 16
_BYTES = 24
"""Of one expert's numbers on the wire."""


def measure_trainability(run: RunState, found: ProgressFacts) -> tuple[float, int]:
    """Add a probe to the history of every expert that got enough tokens since the last check (collective).

    Returns:
        Seconds, and bytes that the numbers took on the wire.

    Raises:
        MocteError: an expert's weights or rows are not finite; on all ranks.
    """
    config, measured, started = run.config.freeze, {}, time.perf_counter()
    failure: str | None = None
    if config.policy == "off":
        return 0.0, 0
    let_go(run.module)
    squares = run.optimizer.unit_square_norms
    for handle in run.blocks:
        for number, bank in enumerate(handle.block.banks):
            layer = bank.deepspeed_moe
            for local, expert in enumerate(bank.local_experts):
                k = number * bank.num_experts + bank.first_local(run.ep_rank) + local
                if not _watched(handle.experts[k], config.policy):
                    continue
                rows = layer.rows[local]
                with on_its_own(expert):  # by all that share it, also by those whose rows are too few
                    if rows is None or len(rows) < MIN_EXPERT_ROWS:
                        continue
                    norm = squares.get(expert_unit(handle.block, k), 0.0)
                    try:
                        value, _ = top_eigenpair(expert, rows.float(), iterations=config.iterations)
                    except (MocteError, RuntimeError) as error:
                        failure = f"the trainability of expert {k} of {handle.name} cannot be measured: {error}"
                        continue
                    measured[handle.index, k] = (value / rows.shape[0], rows.shape[0], norm)
    everywhere = gather_objects(measured)
    # Experts are spread over the ranks: one that stopped alone would leave the others waiting.
    failures = [text for text in gather_objects(failure) if text]
    if failures:
        raise MocteError(failures[0])
    for handle in run.blocks:
        for k, expert in enumerate(handle.experts):
            parts = [part[handle.index, k] for part in everywhere if (handle.index, k) in part]
            if parts:
                own, fair = _progress_of(found.progress.get(handle.index), handle.block, k)
                probe = Probe(
                    step=run.step,
                    share=run.share,
                    value=sum(part[0] for part in parts) / len(parts),
                    tokens=sum(part[1] for part in parts),
                    gradient_norm=sum(part[2] for part in parts) ** 0.5,
                    progress=own,
                    fair=fair,
                )
                expert.history.append(probe)
    return time.perf_counter() - started, _BYTES * sum(len(part) for part in everywhere)


def _progress_of(progress: list[float] | None, block: Block, k: int) -> tuple[float | None, float | None]:
    """Progress of an expert, and the mean of its bank."""
    if progress is None:
        return None, None
    size = block.banks[0].num_experts
    bank = progress[k // size * size : (k // size + 1) * size]
    return progress[k], sum(bank) / size


def _watched(expert: ExpertHandle, policy: str) -> bool:
    """Whether a policy reads this expert: while it trains, and frozen as long as it may be thawed."""
    may_thaw = policy == "trainability" and expert.mode is ExpertMode.FROZEN and not expert.thawed
    return expert.mode is ExpertMode.TRAINING or may_thaw
