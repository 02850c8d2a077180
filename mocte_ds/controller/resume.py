"""What a checkpoint holds of a run's controller, and how a resumed run takes it over."""

from typing import Any

import torch
from torch import Tensor

from mocte_ds.config import MocteConfig
from mocte_ds.controller.check import Check
from mocte_ds.controller.decisions import apply_changes
from mocte_ds.controller.progress import Progress
from mocte_ds.controller.proof import Proof
from mocte_ds.controller.state import RunState
from mocte_ds.dist.collectives import max_over_ranks, sum_over_ranks, world
from mocte_ds.moe.block import Block
from mocte_ds.zero import UnitRegistry, expert_unit


class ResumableRun(RunState):
    """Everything of a run that changes from step to step."""

    def __init__(
        self, config: MocteConfig, blocks: list[Block], registry: UnitRegistry, ep_rank: int, total_steps: int
    ) -> None:
        """See :class:`Controller`."""
        super().__init__(config, blocks, registry, ep_rank, total_steps)
        self.interval = max(1, round(config.check_every * total_steps))
        self.window = self.interval
        """Steps before a check whose features it samples."""
        self.proof, self.progress = Proof(), Progress(config)
        self.sequences = 0
        """Sequences of all passes up to the last optimizer step; the next one's numbers begin here."""
        self.passes = 0
        """Passes of this rank in the optimizer step that goes on."""
        self.sequences_per_step = 0
        """The global batch."""
        self.pass_sequences = 0
        """Sequences of a pass, all ranks together."""
        self.rank = 0
        self.mid_step = False
        """Whether gradients wait for an optimizer step."""
        self._load_seen = [torch.zeros(handle.block.num_experts, dtype=torch.int64) for handle in self.blocks]
        self._check: Check | None = None
        """Measured, and not yet decided on."""
        self._check_state: dict[str, Any] | None = None
        """Of a check that a checkpoint holds, until this rank's own part of it has come."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, in plain values and tensors (collective)."""
        self.proof.require_frozen_unmoved(self)
        # First: the end of a search changes what the blocks remember.
        check = self._check.state_dict(self) if self._check else None
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "usual_tokens": self.context.usual_tokens,
            "shares": [bank.deepspeed_moe.share for handle in self.blocks for bank in handle.block.banks],
            "total_steps": self.total_steps,
            "frozen_layers": self.frozen_layers,
            "blocks": [handle.state_dict() for handle in self.blocks],
            "routed": self.routed(),
            "load_seen": self._load_seen,
            "check": check,
        }

    def rank_state_dict(self) -> dict[str, Any]:
        """What only this rank has: its part of the probe set, its experts of the last check, and its samples."""
        # The next check needs what its window has brought so far; what an earlier one has read is large, and done with.
        needed = not self.config.auto or self.interval - self.step % self.interval < self.window
        return {
            **self.progress.state_dict(),
            "world": world()[1],
            "samples": self._samples() if needed else None,
            "check": self._check.own_state_dict() if self._check else None,
        }

    def _samples(self) -> dict[str, Any]:
        banks = [bank.deepspeed_moe for handle in self.blocks for bank in handle.block.banks]
        return {
            "stream": self.stream.state_dict(),
            "collectors": [collector.state_dict() for collector in self.collectors],
            "banks": [
                {"rows": bank.expert_rows and bank.expert_rows.state_dict(), "by_source": bank.by_source}
                for bank in banks
            ],
        }

    def load_rank_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over what :meth:`rank_state_dict` returned, behind :meth:`load_state_dict` (collective).

        With another number of ranks, or where a rank has none: the probe set is collected anew, and a check that has
        measured but not decided is left out.
        """
        usable = state is not None and state.get("world") == world()[1]
        pending, self._check_state = self._check_state, None
        refused = int(max_over_ranks(torch.tensor(0 if usable else 1)))
        if refused or state is None:
            return
        device = next(self.module.parameters()).device
        self.progress.load_state_dict(state, device)
        self.forget_samples()
        samples = state["samples"]
        if samples:
            self.stream.load_state_dict(samples["stream"])
            for collector, values in zip(self.collectors, samples["collectors"], strict=True):
                collector.load_state_dict(values)
            banks = [bank.deepspeed_moe for handle in self.blocks for bank in handle.block.banks]
            for bank, values in zip(banks, samples["banks"], strict=True):
                if bank.expert_rows is not None and isinstance(values["rows"], dict):
                    bank.expert_rows.load_state_dict(values["rows"], device)
                bank.by_source = values["by_source"]
        if pending and state["check"]:
            self._check = Check.restored(pending, state["check"], device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state: modes, then the partition that follows from them (before weights are loaded)."""
        self.step, self.tokens, self.frozen_layers = state["step"], state["tokens"], state["frozen_layers"]
        # Checkpoints of older versions have no balance of loads: it begins even, as at a birth.
        self.sequences = state.get("sequences", self.step * self.sequences_per_step)
        self.passes, self.context.step_tokens = 0, 0
        self.context.usual_tokens = state.get("usual_tokens")
        layers = [bank.deepspeed_moe for handle in self.blocks for bank in handle.block.banks]
        for layer, share in zip(layers, state.get("shares") or [layer.share for layer in layers], strict=True):
            layer.share = share.to(layer.share.device)
            layer.step_load.zero_()
        for handle, saved in zip(self.blocks, state["blocks"], strict=True):
            handle.load_state_dict(saved)
        for handle, routed in zip(self.blocks, state["routed"], strict=True):
            parts = routed.split([bank.num_experts for bank in handle.block.banks])
            for bank, part in zip(handle.block.banks, parts, strict=True):
                # Totals are kept on one rank, so that the sum over ranks stays the total.
                bank.deepspeed_moe.routed = part.clone() if self.rank == 0 else torch.zeros_like(part)
        self._load_seen = [seen.clone() for seen in state["load_seen"]]
        self._check, self._check_state = None, state.get("check")
        apply_changes(self, [], {})
        self.set_rates()

    def close_step(self) -> None:
        """Sum the step's tokens and loads over the ranks, once for all blocks (collective).

        Integers, so that the sums depend neither on the number of ranks nor on how the batch was split.
        """
        layers = [bank.deepspeed_moe for handle in self.blocks for bank in handle.block.banks]
        layers = [layer for layer in layers if layer.gate.balanced]
        own = [int(self.context.step_tokens), self.passes]
        parts = [torch.tensor(own), *[layer.step_load for layer in layers]]
        summed = sum_over_ranks(torch.cat(parts)).split([len(part) for part in parts])
        tokens, passes = summed[0].tolist()
        self.tokens += tokens
        self.sequences += self.passes * self.pass_sequences
        if tokens and passes:
            self.context.usual_tokens = tokens / passes
        for layer, load in zip(layers, summed[1:], strict=True):
            if int(load.sum()):
                layer.share = (load.double() / load.sum()).float().to(layer.share.device)
            layer.step_load.zero_()
        self.context.step_tokens, self.passes, self.context.loss_scale = 0, 0, None

    def samples_after(self, steps: int) -> bool:
        """Whether the step that follows on so many is one whose features a check wants."""
        return self.config.auto and self.interval - steps % self.interval <= self.window

    def forget_samples(self) -> None:
        """Old rows keep the lowest hashes, so a sample must start anew to show the features of today's weights."""
        self.stream.clear()
        for handle, collector in zip(self.blocks, self.collectors, strict=True):
            collector.clear()
            for bank in handle.block.banks:
                bank.deepspeed_moe.clear_samples()

    def set_rates(self) -> None:
        """Tell the optimizer which part of the learning rate annealing experts get at the next step."""
        anneal = self.config.freeze.anneal
        self.optimizer.rate_factors = {
            expert_unit(handle.block, k): max(0.0, 1.0 - (self.share - expert.annealed_from) / anneal)
            for handle in self.blocks
            for k, expert in enumerate(handle.experts)
            if expert.annealed_from is not None
        }

    def routed(self) -> list[Tensor]:
        """(E,) tokens routed to the experts of each block since the start, all ranks together."""
        counts = [torch.cat([bank.deepspeed_moe.routed for bank in handle.block.banks]) for handle in self.blocks]
        total = sum_over_ranks(torch.cat(counts).clone())
        return list(total.split([count.numel() for count in counts]))
