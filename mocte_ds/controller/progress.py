"""What the experts have learned since the last check, and how many tokens have changed their expert since emergence."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.controller.flops import FlopCount
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.probe import ProbeReading, ProbeSet
from mocte_ds.controller.probe_trial import needs_labels, require_callable
from mocte_ds.controller.run_state import RunState
from mocte_ds.controller.snapshots import Snapshots
from mocte_ds.dist.collectives import from_rank_zero, max_over_ranks, sum_over_ranks
from mocte_ds.dist.mesh import Mesh
from mocte_ds.moe.block import BlockMode, ExpertMode
from mocte_ds.moe.keys import BUILT_IN, TableKey
from mocte_ds.registry import OFF
from mocte_ds.trainability.policy import rule_of
from mocte_ds.zero import expert_unit, let_go


@dataclass
class ProgressFacts:
    """Results by block; the same on all ranks."""

    progress: dict[int, list[float]] = field(default_factory=dict)
    """Loss reduction since the last check, in nats per probe token, by block and expert, of the blocks that were rolled
    back."""
    churn: dict[int, list[float]] = field(default_factory=dict)
    """Share of probe tokens that go to another expert than at emergence, by bank."""
    load: dict[int, list[int]] = field(default_factory=dict)
    """Probe tokens of each expert."""
    imbalance: dict[int, list[float]] = field(default_factory=dict)
    """Largest of those numbers over their mean, by bank."""
    tokens: int = 0
    """Tokens of the probe set."""
    passes: int = 0
    """Forward passes over it."""
    flops: int = 0
    """Of these passes, on this rank."""
    seconds: float = 0.0
    bytes: int = 0
    """Bytes sent, without the experts' own exchange of tokens."""


class Progress:
    """The probe set, and what its readings are compared with."""

    def __init__(self, config: MocteConfig, mesh: Mesh) -> None:
        """Empty; sequences are given, or taken from the first step.

        Args:
            config: the "mocte" block.
            mesh: of the run's ranks.
        """
        wanted = config.probe_tokens or 4 * config.num_experts * config.freeze.rows
        self.probe, self.snapshots = ProbeSet(wanted, config.eod_id, mesh), Snapshots()
        self.active = config.auto and (config.freeze.policy != OFF or config.probe_tokens > 0)
        self.at_every_check = "progress" in rule_of(config.freeze.policy).reads
        """Whether the policy needs a measurement at every check."""
        self._tried = False
        self._born: dict[tuple[int, int], Tensor] = {}
        self._taken = False
        """Whether every rank has snapshots; the same on all ranks."""
        self._flops: dict[tuple[BlockMode, ...], int] = {}
        """Of a pass, by the blocks' modes, where these and the tokens' ids decide."""

    def bind(self, module: nn.Module) -> None:
        """Take the model, before its first step."""
        self.probe.needs_labels = needs_labels(module)

    def close_step(self, run: RunState) -> None:
        """End a step: after the first, what was taken is the probe set, and the model is tried with it (collective).

        Raises:
            MocteError: checks could not call the model.
        """
        if self.active and not self._tried:
            self._tried = True
            self.probe.finish()
            blocks = [handle.block for handle in run.blocks]
            device = next(run.module.parameters()).device
            require_callable(self.probe, run.module, blocks, device, run.mesh)
            let_go(run.module)

    def measure(self, run: RunState, rolled_back: Sequence[BlockHandle]) -> ProgressFacts:
        """Run the probe set with the current experts and, for some blocks, with those of the last check (collective).

        Nothing runs where no block is rolled back and tables of token ids say where the set's tokens go.
        Blocks are rolled back one at a time: with all of them rolled back at once an expert would be credited with what
        those of other blocks have learned of its tokens. That takes a pass for each block that trains.

        Args:
            run: the run.
            rolled_back: blocks whose experts' progress is measured, once they have emerged.
        """
        facts, started = ProgressFacts(), time.perf_counter()
        emerged = [h for h in run.blocks if h.mode is not BlockMode.WARMUP]
        if not self.active or not emerged:
            return facts
        asked = self._taken and any(handle in rolled_back for handle in emerged)
        now = self._read(run, facts) if asked or not self._routes_are_known(run, emerged) else self._by_ids(emerged)
        if now is None:
            return facts
        facts.tokens = self.probe.count()
        self._compare_routes(run, now, facts)
        for handle in emerged if asked and now.losses is not None else []:
            if handle not in rolled_back:
                continue
            units, before = training_units(run, handle), now
            # All ranks make a pass for a block of which any expert trains, wherever that expert lives.
            if handle.mode is BlockMode.SPECIALISING:
                with self.snapshots.in_place(units):
                    again = self._read(run, facts)
                assert again is not None
                before = again
            self._credit(run, handle, now, before, facts)
        self.snapshots.take(training_units(run))
        self._taken = True
        facts.seconds = time.perf_counter() - started
        # Decisions rest on the last bit of it.
        return replace(from_rank_zero(facts, run.mesh.tensor), flops=facts.flops)

    def remember_new(self, run: RunState) -> None:
        """Keep the weights of experts that have just begun to train, or train again: their progress begins here.

        Without them the next check would roll nothing back and find that these experts had learned nothing.
        """
        if self._taken:
            self.snapshots.add(training_units(run))

    def remember_routes(self, run: RunState, blocks: set[int]) -> None:
        """Remember which experts the probe tokens go to when some blocks emerge (collective)."""
        now = self._read(run, ProgressFacts()) if self.active and blocks else None
        if now is not None:
            self._born.update({key: route for key, route in now.routes.items() if key[0] in blocks})

    def state_dict(self) -> dict[str, Any]:
        """Plain values of this rank."""
        return {
            "probe": self.probe.state_dict(),
            "snapshots": self.snapshots.state_dict(),
            "born": dict(self._born),
            "taken": self._taken,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.probe.load_state_dict(state["probe"])
        self.snapshots.load_state_dict(state["snapshots"], device)
        self._born, self._taken = dict(state["born"]), state["taken"]

    def _read(self, run: RunState, facts: ProgressFacts) -> ProbeReading | None:
        """One pass, which the facts count."""
        blocks = [handle.block for handle in run.blocks]
        modes = tuple(handle.mode for handle in run.blocks)
        # Where models are small, counting takes half as long as the pass.
        with contextlib.nullcontext() if modes in self._flops else FlopCount() as count:
            reading = self.probe.read(run.module, blocks, next(run.module.parameters()).device)
        let_go(run.module)
        if count is not None and _by_ids_alone(run):
            self._flops[modes] = count.total
        facts.passes += int(reading is not None)
        facts.flops += self._flops[modes] if count is None else count.total
        return reading

    def _routes_are_known(self, run: RunState, emerged: Sequence[BlockHandle]) -> bool:
        """Whether ids alone say where the set's tokens go, on all ranks, and blocks read these tokens and no others
        when they emerged (collective)."""
        if not _by_ids_alone(run) or not self.probe.complete:
            known = False
        else:
            banks = [(handle.index, number) for handle in emerged for number in range(len(handle.block.banks))]
            known = all(bank in self._born and self._born[bank].shape == self.probe.real.shape for bank in banks)
        return not int(max_over_ranks(torch.tensor(0 if known else 1), run.mesh.world))

    def _by_ids(self, emerged: Sequence[BlockHandle]) -> ProbeReading:
        return self.probe.read_by_ids({handle.index: handle.block for handle in emerged})

    def _compare_routes(self, run: RunState, now: ProbeReading, facts: ProgressFacts) -> None:
        emerged = [handle for handle in run.blocks if handle.mode is not BlockMode.WARMUP]
        own: list[Tensor] = []
        for handle in emerged:
            changed, counted, loads = [], [], []
            for number, bank in enumerate(handle.block.banks):
                born = self._born.get((handle.index, number))
                route, valid = now.way(handle.index, number)
                loads.append(torch.bincount(route[valid], minlength=bank.num_experts))
                same_set = born is not None and born.shape == route.shape
                changed.append(((route != born) & valid).sum() if same_set else torch.tensor(0))
                counted.append(valid.sum() if same_set else torch.tensor(0))
            own += [torch.stack(changed), torch.stack(counted), torch.cat(loads)]
        summed = list(sum_over_ranks(torch.cat(own), run.mesh.data).split([len(part) for part in own]))
        for place, handle in enumerate(emerged):
            changes, counts, load = summed[3 * place : 3 * place + 3]
            if int(counts.sum()):
                facts.churn[handle.index] = (changes / counts.clamp(min=1)).tolist()
            facts.load[handle.index] = load.tolist()
            by_bank = load.double().view(len(handle.block.banks), -1)
            facts.imbalance[handle.index] = (by_bank.amax(1) / by_bank.mean(1).clamp(min=1e-9)).tolist()
        facts.bytes += 8 * sum(len(part) for part in own)

    @staticmethod
    def _credit(
        run: RunState, handle: BlockHandle, now: ProbeReading, before: ProbeReading, facts: ProgressFacts
    ) -> None:
        """Attribute the cost of a block's rollback to the experts that its tokens go to now."""
        assert before.losses is not None and now.losses is not None
        gain = before.losses - now.losses
        counted = torch.isfinite(gain) & now.valid
        sums = [counted.sum()[None].double()]
        for number, bank in enumerate(handle.block.banks):
            own = torch.zeros(bank.num_experts, dtype=torch.float64)
            route, known = now.way(handle.index, number)
            known = known & counted
            sums.append(own.index_add_(0, route[known], gain[known]))
        total, *shares = sum_over_ranks(torch.cat(sums), run.mesh.data).tolist()
        if total:
            facts.progress[handle.index] = [share / total for share in shares]
        facts.bytes += 8 * (1 + len(shares))


def _by_ids_alone(run: RunState) -> bool:
    """Whether the tokens of all emerged blocks go where tables of their ids say: the same way in every pass.

    A key of the user's own that is derived from a table may read features, too.
    """
    gates = [bank.gate for h in run.blocks if h.mode is not BlockMode.WARMUP for bank in h.block.banks]
    tables = {key for key in BUILT_IN.values() if issubclass(key, TableKey)}
    return all(type(gate.key) in tables and not gate.router.learn for gate in gates)


def training_units(run: RunState, handle: BlockHandle | None = None) -> dict[str, tuple[nn.Parameter, ...]]:
    """Experts of this rank that train, of one block or of all."""
    names = run.experts_that(ExpertMode.TRAINING)
    if handle is not None:
        names &= {expert_unit(handle.block, k) for k in range(len(handle.experts))}
    return {name: unit.parameters for name, unit in run.registry.units.items() if name in names}
