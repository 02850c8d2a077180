"""What happens at a check, top to bottom: spectrum -> clusters -> emergence -> trainability -> freezing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mocte_ds.config import MocteConfig
from mocte_ds.controller.check import Check
from mocte_ds.controller.decisions import (
    Change,
    apply_changes,
    decide_freezing,
    decide_prefix,
    emergence_reason,
    start_annealing,
    unlocked_blocks,
)
from mocte_ds.controller.flops import FlopCount, of_all_ranks
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.measurements import finish_readings, read_blocks
from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.resume import ResumableRun
from mocte_ds.dist.collectives import gather_objects, require_same
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.zero import UnitOptimizer, UnitRegistry

EventListener = Callable[[dict[str, Any]], None]


class Controller(ResumableRun):
    """`engine.mocte`: owns the modes of all blocks and experts, decides at checks, acts between optimizer steps.

    A check measures behind one optimizer step and decides `apply_after` steps later; in between the search for clusters
    goes on in a thread. The later step is the same on all ranks and in a resumed run.
    """

    def __init__(
        self, config: MocteConfig, blocks: list[Block], registry: UnitRegistry, ep_rank: int, total_steps: int
    ) -> None:
        """Prepare the blocks; :meth:`bind` hands over the engine's parts.

        Args:
            config: the "mocte" block.
            blocks: the model's blocks.
            registry: their units.
            ep_rank: this rank's place in its expert-parallel group.
            total_steps: optimizer steps of the run.
        """
        super().__init__(config, blocks, registry, ep_rank, total_steps)
        for block, collector in zip(blocks, self.collectors, strict=True):
            block.observe = collector.see
        # What some blocks have seen of a pass that was not completed, others have not.
        self.context.on_abandoned = self.forget_samples
        self._listeners: list[EventListener] = []
        self._domain: Tensor | None = None
        """Of the next forward pass."""
        self._sampled_step = -1
        """Steps done before the one that was sampled last."""

    def bind(
        self, module: torch.nn.Module, optimizer: UnitOptimizer, scheduler: Any, rank: int, sequences_per_step: int
    ) -> None:
        """Hand over the engine's module, optimizer and scheduler, this rank's number and the global batch size."""
        self.module, self.optimizer, self.scheduler, self.rank = module, optimizer, scheduler, rank
        self.sequences_per_step = sequences_per_step
        self.progress.bind(module)
        # Few rows a sequence: neighbours in a sequence are alike.
        spectrum = self.config.spectrum
        enough = max((spectrum.rows << spectrum.doublings) / 16, spectrum.documents) / sequences_per_step
        self.window = min(self.interval, max(1, round(enough + 0.5)))

    # ---- for users -------------------------------------------------------------------------------------------------

    def annotate(self, domain: Tensor | None, names: list[str]) -> None:
        """Say where the next forward pass's batch comes from, so that checks can compare clusters with sources.

        Args:
            domain: (B,) index into ``names``, or None.
            names: names of the sources.
        """
        self._domain, self.domain_names = domain, list(names)

    def set_probe(self, input_ids: Tensor, domain: Tensor | None = None) -> None:
        """Look at these sequences at every check; without them, at some of the first step's.

        Held-out sequences are better: what experts learn of them is no memory. The model is called with `input_ids`.

        Args:
            input_ids: (S, T) the same on all ranks; the first ones are used, as many as `probe_tokens` asks for.
            domain: (S,) index of each into the names given to :meth:`annotate`, or None.

        Raises:
            MocteError: another shape, or after the first step.
        """
        if input_ids.dim() != 2 or not len(input_ids) or (domain is not None and domain.shape != input_ids.shape[:1]):
            raise MocteError(f"the probe set must be (S, T) token ids and (S,) sources, not {tuple(input_ids.shape)}.")
        if self.step:
            raise MocteError(
                "the probe set must be given before the first step; later checks compare with earlier ones."
            )
        if self.progress.active:
            self.progress.probe.give(input_ids, domain)

    def on_event(self, listener: EventListener) -> None:
        """Call ``listener`` with every event (check, projection, emergence, freeze, thaw), on rank 0 only."""
        self._listeners.append(listener)

    def emerge(self, block: int) -> None:
        """Turn a block's experts on now (collective, between two steps)."""
        self._require_between_steps("emerge")
        handle = self._handle(block)
        if handle.mode is not BlockMode.WARMUP:
            raise MocteError(f"block {block} ({handle.name}) is {handle.mode}: its experts have emerged already.")
        with FlopCount() as spectrum:
            readings, search = read_blocks(self, [handle], in_background=False)
        finish_readings(self, readings, search)
        # All ranks know what the search has cost all of them.
        searched = sum(r.found.flops for r in readings.values() if r.found) if self.rank == 0 else 0
        spent = {"spectrum": spectrum.total, "clusters": searched}
        self._apply([Change("emergence", block, None, "called", by_hand=True)], readings, spent)

    def freeze(self, block: int, expert: int) -> None:
        """Freeze an expert now (collective, between two steps); it stays frozen until :meth:`thaw` is called for it."""
        self._demand(block, expert, ExpertMode.TRAINING, "freeze")
        self._apply([Change("freeze", block, expert, "called", by_hand=True)], {})

    def thaw(self, block: int, expert: int) -> None:
        """Let a frozen expert train again, with fresh moments (collective, between two steps).

        What was measured before has no part in a decision to freeze it again.
        """
        self._demand(block, expert, ExpertMode.FROZEN, "thaw")
        if self.in_frozen_front(self.blocks[block]):
            raise MocteError(f"cannot thaw expert {expert} of block {block}: it lies in a layer of the frozen front.")
        self._apply([Change("thaw", block, expert, "called", by_hand=True)], {})

    def freeze_prefix(self, layers: int) -> None:
        """Freeze the embeddings and the first ``layers`` layers now (collective, between two steps).

        No graph is built for them from then on, so that their gradients by inputs are saved too. With tied embeddings
        the output matrix is frozen with them.

        Args:
            layers: at most `freeze.prefix.layers`, and more than are frozen already.

        Raises:
            MocteError: another number, or a block in one of these layers has experts to train.
        """
        self._require_between_steps("freeze_prefix")
        most = self.config.freeze.prefix.layers
        if not self.frozen_layers < layers <= most:
            raise MocteError(
                f"freeze_prefix({layers}): {self.frozen_layers} layers of the front are frozen, and "
                f"mocte.freeze.prefix.layers allows {most}."
            )
        open_blocks = [name for layer in range(layers) for name in unlocked_blocks(self, layer)]
        if open_blocks:
            raise MocteError(f"freeze_prefix({layers}): {open_blocks[0]} still trains; freeze all its experts first.")
        self._apply([Change("prefix", None, None, "called", by_hand=True, layers=layers)], {})

    def optimizer_bytes(self) -> int:
        """Bytes of fp32 master weights and optimizer state on this rank."""
        return self.optimizer.optimizer_bytes()

    def auxiliary_loss(self) -> Tensor | None:
        """What backward will add for even loads of learned routers, without a graph; None for nothing.

        The sum over forward passes whose graphs wait for a backward pass; one whose graph is never run adds nothing.
        """
        losses = [loss for handle in self.blocks if (loss := handle.block.auxiliary_loss()) is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def expert_load(self) -> list[list[int]]:
        """Tokens routed to each expert of each block since the last call, all ranks together (collective)."""
        result = []
        for number, routed in enumerate(self.routed()):
            result.append((routed - self._load_seen[number]).tolist())
            self._load_seen[number] = routed
        return result

    # ---- called by the engine --------------------------------------------------------------------------------------

    def before_micro_batch(self, rank: int, ranks: int, micro: int, args: tuple, kwargs: dict) -> None:
        """Tell the blocks where in the run the next pass that trains stands.

        Passes are counted, not the engine's steps: DeepSpeed counts no steps within `no_sync`, or where a loop calls
        `step` once for several passes.

        Args:
            rank: of this process among those that share the data.
            ranks: how many these are.
            micro: sequences of a micro-batch.
            args: of the model's call.
            kwargs: of the model's call.
        """
        place = (self.passes * ranks + rank) * micro
        self.passes, self.pass_sequences = self.passes + 1, ranks * micro
        domain, self._domain = self._domain, None
        if self.progress.active and not self.progress.probe.complete:
            self.progress.probe.offer(args, kwargs, place, self.sequences_per_step, domain)
        left = self.interval - self.step % self.interval
        for_check = self.config.auto and left <= self.window
        # A check wants the rows of its window. What it has read stays until the next window, for emerge(); without
        # checks the rows of the last step do.
        if self._sampled_step != self.step and (left == self.window or not self.config.auto):
            self.forget_samples()
        self._sampled_step = self.step
        warming_up = any(handle.mode is BlockMode.WARMUP for handle in self.blocks)
        self.context.announce(
            first_sequence=self.sequences + place,
            micro_batch=micro,
            domain=domain,
            sources=len(self.domain_names),
            sampling=for_check or (warming_up and not self.config.auto),
        )

    def after_step(self, step: int) -> None:
        """Do what is due after optimizer step ``step``."""
        self.step, self.mid_step = step, False
        self.close_step()
        self.proof.after_step(self)
        self.progress.close_step(self)
        if self._check is not None and (step >= self._check.step + self._delay or step == self.total_steps):
            self._decide()
        if self.config.auto and step % self.interval == 0 and step <= self.total_steps:
            self._measure()
            if not self._delay or step == self.total_steps:
                self._decide()
        self.set_rates()

    @property
    def _delay(self) -> int:
        """Steps from a check's measurements to its decisions: a check is over before the next one begins."""
        return min(self.config.apply_after, self.interval - 1)

    # ---- the check -------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """The first half of a check (collective)."""
        self.proof.require_frozen_unmoved(self)
        for handle, counts in zip(self.blocks, self.routed(), strict=True):
            for expert, count in zip(handle.experts, counts.tolist(), strict=True):
                expert.tokens = count
        every = self.config.conflict_every
        conflict_now = self.progress.active and every > 0 and (self.step // self.interval) % every == 0
        self._check = Check.measure(self, self.progress, conflict_now, in_background=self._delay > 0)

    def _decide(self) -> None:
        """The second half: emergence and freezing, from the same numbers on all ranks (collective)."""
        check, self._check = self._check, None
        assert check is not None
        check.finish(self)
        changes = []
        for handle in self.blocks:
            reason = emergence_reason(handle, check.readings[handle.index], self.config.clusters, check.share)
            if reason:
                changes.append(Change("emergence", handle.index, None, reason))
        decided = decide_freezing(self, check.share, check.step)
        changes += start_annealing(self.blocks, decided, self.config.freeze.anneal, self.share)
        changes += decide_prefix(self, check.share, changes)
        self._emit(check.event(self))
        if changes:
            self._apply(changes, check.readings)
        if self.share >= 1.0:
            self._emit_projections(check.readings)

    def _apply(
        self, changes: list[Change], readings: dict[int, BlockReading], spent: dict[str, int] | None = None
    ) -> None:
        """Carry out a plan that all ranks agree on, in one rebuild of the partition.

        Args:
            changes: the plan.
            readings: of the blocks that emerge.
            spent: FLOPs that these have cost on this rank, by part, where no check tells of them.
        """
        require_same([str(change) for change in changes], f"plan of changes after step {self.step}")
        emerging = {change.block for change in changes if change.kind == "emergence"}
        self._emit_projections({i: reading for i, reading in readings.items() if i in emerging})
        self.proof.require_frozen_unmoved(self)
        before = gather_objects(self.optimizer_bytes())
        with FlopCount() as births:
            facts = apply_changes(self, changes, readings)
        self.proof.begin(self)
        after = gather_objects(self.optimizer_bytes())
        with FlopCount() as looking:
            self.progress.remember_routes(self, emerging)
        own = {"spectrum": 0, "clusters": births.total, "progress": looking.total}
        facts[0]["flops"] = of_all_ranks({part: n + (spent or {}).get(part, 0) for part, n in own.items()})
        for change, fact in zip(changes, facts, strict=True):
            event = {"event": change.kind, "block": change.block, "reason": change.reason, **fact}
            if change.block is not None:
                handle = self.blocks[change.block]
                event["name"] = handle.name
                if change.expert is not None:
                    event.update(expert=change.expert, **{"lambda": handle.experts[change.expert].trainability})
            sizes = {"optimizer_bytes_before": sum(before), "optimizer_bytes_after": sum(after)}
            by_rank = {"optimizer_bytes_by_rank_before": before, "optimizer_bytes_by_rank_after": after}
            self._emit({**event, **sizes, **by_rank})

    # ---- events ----------------------------------------------------------------------------------------------------

    def _emit_projections(self, readings: dict[int, BlockReading]) -> None:
        for index, reading in readings.items():
            self._emit({"event": "projection", "block": index, **reading.projection(self.domain_names)})

    def _emit(self, event: dict[str, Any]) -> None:
        if self.rank == 0:
            event = {"event": event["event"], "step": self.step, "tokens": self.tokens, **event}
            for listener in self._listeners:
                listener(event)

    def _handle(self, block: int) -> BlockHandle:
        if not 0 <= block < len(self.blocks):
            raise MocteError(f"there is no block {block}: the model has blocks 0 to {len(self.blocks) - 1}.")
        return self.blocks[block]

    def _require_between_steps(self, verb: str) -> None:
        """A change of the partition in the middle of a step would lose the gradients that it holds."""
        if self.mid_step:
            raise MocteError(
                f"{verb} was called between a backward pass and the optimizer's step; call it behind engine.step() of "
                "the last micro-batch of a step."
            )

    def _demand(self, block: int, expert: int, mode: ExpertMode, verb: str) -> None:
        self._require_between_steps(verb)
        experts = self._handle(block).experts
        if not 0 <= expert < len(experts):
            raise MocteError(f"block {block} has no expert {expert}: it has experts 0 to {len(experts) - 1}.")
        if experts[expert].mode is not mode:
            raise MocteError(
                f"cannot {verb} expert {expert} of block {block}: it is {experts[expert].mode}, not {mode}."
            )
