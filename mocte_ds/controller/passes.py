"""Counts what forward passes did in each optimizer step: sequences, tokens, and the loads of the experts."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import from_rank_zero, stack_over_ranks, sum_over_ranks
from mocte_ds.errors import MocteError
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import BlockMode
from mocte_ds.moe.forward import BEYOND
from mocte_ds.remote_code.tokens_mocte import RoutingError


class Passes:
    """Numbers the sequences of the run and sums tokens and loads over the ranks.

    Passes are counted, not the engine's steps: DeepSpeed counts no steps within `no_sync`, or where a loop calls `step`
    once for several passes.
    """

    def __init__(self, run: RunState) -> None:
        """Begin before the first step."""
        self._run = run
        self._banks = [bank for handle in run.blocks for bank in handle.block.banks]
        self.sequences = 0
        """Sequences of all passes up to the last optimizer step; the next step is numbered from here."""
        self._parts = 0
        """Micro-batches of this rank in the current optimizer step: passes between which a backward pass has run."""
        self._texts = 0
        """Texts of each of its sequences, e.g. the chosen and the rejected answer of a preference loss."""
        self._brought_in = True
        """Whether a backward pass has run since the last of them."""
        self._size = 0
        """Sequences of a pass, all ranks together."""
        self._load_seen = [torch.zeros(handle.block.num_experts, dtype=torch.int64) for handle in run.blocks]
        self._seen_before: list[Tensor] | None = None
        """What had been told before the current step, where something was told in it."""

    def begin(self, micro: int, texts: int) -> int:
        """Count a pass that is about to run.

        Args:
            micro: sequences of a micro-batch.
            texts: sequences of this pass; if more than ``micro``, several per sequence of the micro-batch.

        Returns:
            Place of its first sequence in the optimizer step. Passes of one micro-batch are numbered as one call of
            all their texts.
        """
        if self._brought_in:
            self._parts, self._texts = self._parts + 1, 0
        data = self._run.mesh.data
        place = ((self._parts - 1) * data.size + data.rank) * micro + self._texts * BEYOND
        self._brought_in, self._size = False, data.size * micro
        self._texts += max(1, -(-texts // micro))
        return place

    def after_backward(self) -> None:
        """Note that the next pass is of another micro-batch."""
        self._brought_in = True

    def close_step(self) -> None:
        """Sum the step's tokens and loads over the ranks, in one all-reduce for all blocks (collective).

        Integers, so that the sums depend neither on the number of ranks nor on how the batch was split.
        """
        run, context = self._run, self._run.context
        banks = [bank for bank in self._banks if bank.gate.reads_loads]
        parts = [torch.tensor([int(context.step_tokens), context.step_passes]), *[bank.loads.step for bank in banks]]
        summed = self._summed(torch.cat(parts)).split([len(part) for part in parts])
        tokens, passes = summed[0].tolist()
        run.tokens += tokens
        self.sequences += self._parts * self._size
        if tokens and passes:
            context.usual_tokens = tokens / passes
        loads = dict(zip(banks, summed[1:], strict=True))
        # Where fp16 has overflowed, the step is skipped, and what routers have read may be infinite.
        if not run.optimizer.overflow:
            self._move_gates(loads)
            for bank, load in loads.items():
                bank.loads.end_step(load)
        for bank in self._banks:
            bank.loads.forget_step()
        self._begin_step()

    def take_back_step(self) -> None:
        """Forget the passes of a step that is skipped: the next one has its place."""
        for bank in self._banks:
            bank.loads.take_back_step()
        if self._seen_before is not None:  # the step's loads were told before it was skipped
            self._load_seen = self._seen_before
        self._begin_step()

    def _begin_step(self) -> None:
        context = self._run.context
        context.step_tokens, context.step_passes, context.loss_scale = 0, 0, None
        self._parts, self._texts, self._brought_in, self._seen_before = 0, 0, True, None

    def _summed(self, own: Tensor) -> Tensor:
        """Sum over the ranks that read different data; all tensor ranks have the first one's, to the last bit."""
        return from_rank_zero(sum_over_ranks(own, self._run.mesh.data), self._run.mesh.tensor)

    def _move_gates(self, loads: Mapping[Bank, Tensor]) -> None:
        """Update biases for even loads, running means and moving clusters, except where all experts are frozen."""
        moving = {
            bank for handle in self._run.blocks for bank in handle.block.banks if handle.mode is BlockMode.SPECIALISING
        }
        weighed = [bank for bank in loads if bank.gate.router.unit_mean]
        sums = []
        if weighed:
            sums = self._summed(torch.cat([bank.loads.weight for bank in weighed])).tolist()
        for bank, total in zip(weighed, sums, strict=True):
            tokens = int(loads[bank].sum()) / bank.gate.router.top_k
            if tokens and bank in moving:
                bank.gate.follow_mean(total / tokens)
        self._follow_tokens({bank: load for bank, load in loads.items() if bank.gate.key.moves}, moving)
        for bank, load in loads.items():
            if bank in moving:
                bank.gate.balance(load)

    def _follow_tokens(self, loads: Mapping[Bank, Tensor], moving: Collection[Bank]) -> None:
        """Move the keys that follow their tokens; all ranks get the same sums.

        Raises:
            MocteError: features are not finite; on all ranks.
        """
        if not loads:
            return
        own = [bank.gate.key.no_sums() if bank.loads.sums is None else bank.loads.sums for bank in loads]
        summed = self._summed(torch.cat([part.flatten() for part in own]))
        parts = summed.split([part.numel() for part in own])
        for (bank, load), mine, part in zip(loads.items(), own, parts, strict=True):
            if bank not in moving:
                continue
            try:
                bank.gate.key.follow(part.view(mine.shape), load)
            except RoutingError as error:
                raise MocteError(
                    f"step {self._run.step}, router {bank.gate.key.name}: {error} Start again from the last "
                    "checkpoint, with a lower learning rate."
                ) from None

    def routed(self) -> list[Tensor]:
        """(E,) tokens routed to the experts of each block since the start, all ranks together (collective)."""
        return self._by_block(sum_over_ranks(self._counts(), self._run.mesh.data))

    def routed_since_last_call(self) -> list[list[int]]:
        """Tokens routed to each expert of each block since the last call, all ranks together (collective)."""
        return self._since_last_call(self.routed())

    def tell(self, numbers: Sequence[float]) -> tuple[Tensor, list[list[int]]]:
        """What each rank says, and :meth:`routed_since_last_call`, in one exchange (collective).

        Args:
            numbers: of this rank; as many on all ranks.

        Returns:
            (ranks, numbers) fp64, and the tokens.
        """
        told, routed = self.tell_routed(numbers)
        return told, self._since_last_call(routed)

    def tell_routed(self, numbers: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Like :meth:`tell`, with :meth:`routed` in place of what has come since."""
        mesh, own = self._run.mesh, torch.tensor(list(numbers), dtype=torch.float64)
        counts = self._counts()
        if mesh.tensor.rank:  # ranks of a tensor group count the same tokens
            counts.zero_()
        rows = stack_over_ranks(torch.cat([own.view(torch.int64), counts]), mesh.world)
        told, routed = rows.split([len(own), len(counts)], dim=1)
        return told.contiguous().view(torch.float64), self._by_block(routed.sum(dim=0))

    def _counts(self) -> Tensor:
        """A copy of this rank's totals, block by block and bank by bank."""
        return torch.cat([bank.loads.total for bank in self._banks])

    def _by_block(self, counts: Tensor) -> list[Tensor]:
        return list(counts.split([handle.block.num_experts for handle in self._run.blocks]))

    def _since_last_call(self, totals: list[Tensor]) -> list[list[int]]:
        if self._parts and self._seen_before is None:
            self._seen_before = list(self._load_seen)
        result = []
        for number, routed in enumerate(totals):
            result.append((routed - self._load_seen[number]).tolist())
            self._load_seen[number] = routed
        return result

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, the same on all ranks (collective)."""
        return {
            "sequences": self.sequences,
            "usual_tokens": self._run.context.usual_tokens,
            "shares": [bank.loads.share for bank in self._banks],
            "routed": self.routed(),
            "load_seen": self._load_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        run, context = self._run, self._run.context
        # Checkpoints of older versions have no balance of loads: it begins even, as at a birth.
        self.sequences = state.get("sequences", run.step * run.sequences_per_step)
        self._begin_step()
        context.usual_tokens = state.get("usual_tokens")
        shares = state.get("shares") or [bank.loads.share for bank in self._banks]
        for bank, share in zip(self._banks, shares, strict=True):
            bank.loads.share = share.cpu()
            bank.loads.forget_step()
        for handle, routed in zip(run.blocks, state["routed"], strict=True):
            parts = routed.split([bank.num_experts for bank in handle.block.banks])
            for bank, part in zip(handle.block.banks, parts, strict=True):
                # Totals are kept on one rank, so that the sum over ranks stays the total.
                bank.loads.total = part.clone() if run.mesh.data.rank == 0 else torch.zeros_like(part)
        self._load_seen = [seen.clone() for seen in state["load_seen"]]
