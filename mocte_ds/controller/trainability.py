"""Measures the trainability of every expert on exactly `freeze.rows` of the rows that it got before the check."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from mocte_ds.controller.expert_rows import Wanted, found_rows, merged_rows
from mocte_ds.controller.flops import FlopCount
from mocte_ds.controller.handles import BlockHandle, ExpertHandle
from mocte_ds.controller.progress import ProgressFacts
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.errors import MocteError
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.registry import OFF
from mocte_ds.trainability import Probe, products_flops, top_eigenpair
from mocte_ds.trainability.policy import rule_of
from mocte_ds.zero import expert_unit, let_go, on_its_own

_BYTES = 24
"""Bytes of one expert's numbers that are sent."""


@dataclass
class TrainabilityFacts:
    """Results of a measurement besides the probes; the same on all ranks except for the seconds and FLOPs."""

    sampled: dict[int, list[int]] = field(default_factory=dict)
    """Rows found of each expert, by block, at most `freeze.rows`; an expert with fewer is not measured."""
    seconds: float = 0.0
    bytes: int = 0
    """Bytes of rows and numbers that were sent."""
    flops: int = 0
    """Of this rank."""


def measure_trainability(run: RunState, found: ProgressFacts) -> TrainabilityFacts:
    """Add a probe to the history of every watched expert of which enough rows were sampled (collective).

    Each expert is measured once, on the merged rows of all ranks; its replicas take turns. So lambda does not depend on
    the number of ranks or on `ep_size`, but for the rounding of the training itself.

    Raises:
        MocteError: an expert's weights or rows are not finite; on all ranks.
    """
    facts, started = TrainabilityFacts(), time.perf_counter()
    if run.config.freeze.policy == OFF:
        return facts
    may_thaw = rule_of(run.config.freeze.policy).may_thaw
    let_go(run.module)
    mesh = run.mesh
    values: dict[tuple[int, int], float] = {}
    failures: list[str] = []
    banks = list(_banks(run))
    samples = [run.samples.rows[bank.deepspeed_moe] for _, _, bank in banks]
    watched: list[tuple[BlockHandle, Bank, int, int]] = []
    wanted: list[Wanted] = []
    for (handle, number, bank), rows, sampled in zip(banks, samples, found_rows(samples, mesh.data), strict=True):
        facts.sampled.setdefault(handle.index, []).extend(sampled)
        first = number * bank.num_experts
        for k, count in enumerate(sampled):
            if count == rows.count and _watched(handle.experts[first + k], may_thaw):
                watched.append((handle, bank, k, first + k))
                wanted.append(Wanted(rows, k, handle.block.hidden_size))
    device = next(run.module.parameters()).device
    turns: Counter[Bank] = Counter()
    for (handle, bank, k, name), rows in zip(watched, merged_rows(wanted, device, mesh.data), strict=True):
        facts.bytes += rows.numel() * rows.element_size()
        turn, turns[bank] = turns[bank], turns[bank] + 1
        local = k - bank.first_local(mesh.expert.rank)
        if not 0 <= local < len(bank.local_experts):
            continue
        with on_its_own(bank.local_experts[local]):  # by all that share it, though one of them measures
            if turn % mesh.expert_data.size != mesh.expert_data.rank:
                continue
            try:
                values[handle.index, name] = _lambda(run, bank.local_experts[local], rows, facts)
            except (MocteError, RuntimeError) as error:
                failures.append(f"the trainability of expert {name} of {handle.name} cannot be measured: {error}")
    everywhere = gather_objects((values, failures), mesh.world)
    # Experts are spread over the ranks: one that stopped alone would leave the others waiting.
    for _, texts in everywhere:
        if texts:
            raise MocteError(texts[0])
    values = {key: value for part, _ in everywhere for key, value in part.items()}
    _remember(run, found, values)
    facts.seconds, facts.bytes = time.perf_counter() - started, facts.bytes + _BYTES * len(values)
    return facts


def _banks(run: RunState) -> Iterator[tuple[BlockHandle, int, Bank]]:
    """The banks whose experts run, with their number in their block."""
    for handle in run.blocks:
        if handle.mode is not BlockMode.WARMUP:
            for number, bank in enumerate(handle.block.banks):
                yield handle, number, bank


def _lambda(run: RunState, expert: nn.Module, rows: Tensor, facts: TrainabilityFacts) -> float:
    """Largest eigenvalue of the expert's kernel over the number of rows; ``facts`` take the FLOPs."""
    kind = (type(expert), tuple(p.shape for p in expert.parameters()), rows.shape)
    look = partial(top_eigenpair, expert, rows, iterations=run.config.freeze.iterations)
    if kind in run.flops_of_lambda:
        found = look()
    else:  # where experts are small, counting takes longer than their products
        with FlopCount() as count:
            before: dict[int, int] = {}
            found = look(after=lambda products: before.setdefault(products, count.total))
        run.flops_of_lambda[kind] = before[0], before[1] - before[0]
    start, product = run.flops_of_lambda[kind]
    facts.flops += start + products_flops(product, found.vector.numel(), found.products)
    value = found.value / len(rows)
    if not math.isfinite(value):
        raise MocteError(f"it is {value}; some weights are NaN, infinite or too large.")
    return value


def _remember(run: RunState, found: ProgressFacts, values: dict[tuple[int, int], float]) -> None:
    """A probe for each value (collective)."""
    norms = gradient_norms(run)
    for (index, k), value in sorted(values.items()):
        handle = run.blocks[index]
        own, fair = _progress_of(found.progress.get(index), handle.block, k)
        probe = Probe(
            step=run.step,
            share=run.share,
            value=value,
            tokens=run.config.freeze.rows,
            gradient_norm=norms.get(expert_unit(handle.block, k), 0.0),
            progress=own,
            fair=fair,
        )
        handle.experts[k].history.append(probe)


def gradient_norms(run: RunState) -> dict[str, float]:
    """L2 norm of each expert's gradient at the last step, from the partitions of all ranks (collective)."""
    squares: dict[str, float] = defaultdict(float)
    experts = {expert_unit(handle.block, k) for handle in run.blocks for k in range(len(handle.experts))}
    own = {unit: value for unit, value in run.optimizer.unit_square_norms.items() if unit in experts}
    for part in gather_objects(own, run.mesh.world):
        for unit, value in part.items():
            squares[unit] += value
    return {unit: value**0.5 for unit, value in squares.items()}


def _progress_of(progress: list[float] | None, block: Block, k: int) -> tuple[float | None, float | None]:
    """Progress of an expert, and the mean progress of its bank."""
    if progress is None:
        return None, None
    size = block.banks[0].num_experts
    bank = progress[k // size * size : (k // size + 1) * size]
    return progress[k], sum(bank) / size


def _watched(expert: ExpertHandle, may_thaw: bool) -> bool:
    """Whether the policy reads this expert: while it trains, and while it is frozen and may thaw."""
    thaws = may_thaw and expert.mode is ExpertMode.FROZEN and not expert.thawed
    return expert.mode is ExpertMode.TRAINING or thaws
