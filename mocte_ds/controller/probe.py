"""A few sequences that every check looks at again: which experts their tokens go to, and their loss.

Held-out sequences where the training loop gives some. Otherwise they are taken from the first optimizer step, by their
global numbers, so that they are the same however many ranks there are.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.controller.probe_batches import Call, Rows, ids_of, labelled, spread, together
from mocte_ds.controller.route_observer import RouteObserver
from mocte_ds.dist.collectives import max_over_ranks, sum_over_ranks
from mocte_ds.dist.mesh import Mesh
from mocte_ds.moe.block import Block
from mocte_ds.moe.forward import ForwardState, sequence_numbers
from mocte_ds.zero import forward_pass

# Shapes: S sequences of this rank, T tokens.

GRADIENT_TOKENS = 1024
"""Gradients are measured on this many first tokens of a sequence: the graph of all may not fit into memory."""


@dataclass
class ProbeReading:
    """Results of one pass over the probe set on this rank."""

    losses: Tensor | None
    """(S, T) fp64 loss of the next token in nats, NaN where it does not count (:attr:`ProbeSet.targets`); None
    where the model gives no logits."""
    routes: dict[tuple[int, int], Tensor]
    """(block, bank) to (S, T) int64 experts."""
    valid: Tensor
    """(S, T) False for padding, and for a filler sequence, which a rank without one of its own runs."""

    def way(self, block: int, bank: int) -> tuple[Tensor, Tensor]:
        """(S, T) int64 experts, and (S, T) bool: True where they are known and the token counts."""
        route = self.routes.get((block, bank))
        if route is None:  # the block read another number of tokens; all ranks go on together
            return torch.zeros(self.valid.shape, dtype=torch.int64), torch.zeros_like(self.valid)
        return route, self.valid


@dataclass
class ProbeGradient:
    """Results of a pass with its graph."""

    loss: Tensor
    """() sum of the next tokens' losses over the places that count."""
    places: dict[tuple[int, int], list[Tensor]]
    """(block, expert) to, for each of the expert's calls, (n, 2) of each row that it read, its sequence
    (:attr:`ProbeSet.number`; -1 where it does not count) and its place in it; expert -1 is the block's dense FFN."""


class ProbeSet:
    """The sequences and how to run them."""

    def __init__(self, tokens: int, eod_id: int | None, mesh: Mesh) -> None:
        """Empty.

        Args:
            tokens: wanted over all ranks.
            eod_id: token that ends a document; the loss of the one after it does not count.
            mesh: the ranks that share the sequences out.
        """
        self._wanted, self._eod_id, self._mesh = tokens, eod_id, mesh
        self._offers: list[Rows] = []
        self._company: Rows | None = None
        self._batch = 0
        self._rows: Rows | None = None
        self._valid = torch.empty(0, dtype=torch.bool)
        self.collected = False
        """True where the set was taken from the first step."""
        self.needs_labels = False
        """Whether the model cannot be called without labels."""

    @property
    def complete(self) -> bool:
        """Whether this rank has its part of the set, complete."""
        return self._rows is not None

    def offer(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        offset: int,
        batch: int,
        domain: Tensor | None = None,
        micro: int | None = None,
    ) -> None:
        """Take what may belong to the set from a micro-batch of the first step.

        Args:
            args: of the model's call.
            kwargs: of the model's call.
            offset: of the micro-batch's first sequence in the global batch.
            batch: sequences of the global batch.
            domain: (B,) source of each sequence, None where unknown.
            micro: sequences of a micro-batch; a call may hold further texts of the same samples. None: it does not.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.complete or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            return
        labels = kwargs.get("labels")
        rows = Rows(
            call=(list(args), {name: v for name, v in kwargs.items() if name != "labels" or self.needs_labels}),
            domain=(domain if domain is not None else torch.full((len(ids),), -1)).cpu(),
            number=sequence_numbers(offset, micro, len(ids)),
            labelled=labelled(ids.cpu(), None if labels is None else labels.cpu()),
            length=torch.full((len(ids),), ids.shape[1]),
        )
        # The longest sequence of the step will not be shorter than these, nor the set larger.
        self._batch, chosen = batch, self._chosen(rows.number, batch, ids.shape[1])
        if chosen.any():
            self._offers.append(rows.cut(chosen))
        elif self._company is None:
            self._company = rows.cut(torch.arange(len(ids)) == 0)

    def _chosen(self, number: Tensor, batch: int, longest: int) -> Tensor:
        """(n,) bool: which of the global batch's sequences belong to the set; a larger set contains a smaller one."""
        count = min(batch, math.ceil(self._wanted / longest))
        return (number < batch) & (spread(batch)[number.clamp(max=batch - 1)] < count)

    def give(self, ids: Tensor, domain: Tensor | None, given: Mapping[str, Any] | None = None) -> None:
        """Take these sequences, this rank its part of them, in place of some of the first step.

        Args:
            ids: (S, T), the same on all ranks; the first ones are used, as many as are wanted.
            domain: (S,) source of each sequence, None where unknown.
            given: what else the model is called with; tensors (S, ...) have a row for each sequence.
        """
        chosen = torch.arange(min(len(ids), max(1, math.ceil(self._wanted / ids.shape[1]))))
        known = domain.cpu() if domain is not None else torch.full((len(ids),), -1)
        mine = chosen[self._mesh.data.rank :: self._mesh.data.size]
        self._valid = torch.ones(len(mine), dtype=torch.bool)
        if not len(mine):  # experts are spread over ranks, so every rank has to make every pass
            mine, self._valid = chosen[:1], torch.zeros(1, dtype=torch.bool)
        call = {**(given or {}), "input_ids": ids, **({"labels": ids} if self.needs_labels else {})}
        every = torch.ones(ids.shape, dtype=torch.bool)
        rows = Rows(((), call), known, torch.arange(len(ids)), every, torch.full((len(ids),), ids.shape[1]))
        keep = torch.zeros(len(ids), dtype=torch.bool)
        keep[mine] = True
        self._rows = rows.cut(keep)

    def withdraw(self) -> None:
        """Forget what was offered: the first step is taken again, with other sequences."""
        self._offers, self._company = [], None

    def finish(self) -> None:
        """The first step is over: the set is what was taken (collective).

        Shorter micro-batches are filled up to the rank's longest one. Those with other arguments, or with arguments
        that cannot be filled up, are left out; arguments without a row per sequence must be equal.
        """
        offers = [*self._offers, *([self._company] if self._company else [])]
        own = torch.tensor(max((int(rows.length.max()) for rows in offers), default=0))
        longest = int(max_over_ranks(own, self._mesh.world))
        self._offers, self._company = [], None
        if self.complete or not offers:
            return
        company = offers[0].cut(torch.arange(len(offers[0].number)) == 0)
        kept = [rows.cut(self._chosen(rows.number, self._batch, longest)) for rows in offers]
        kept = [rows for rows in kept if len(rows.number)]
        rows = together(kept or [company])  # experts are spread over ranks, so every rank has to make every pass
        everyone = torch.arange(self._batch)
        rows.number = torch.searchsorted(everyone[self._chosen(everyone, self._batch, longest)], rows.number)
        self._rows, self._valid = rows, torch.full(rows.number.shape, bool(kept))
        self.collected = True

    def read(self, module: nn.Module, blocks: list[Block], device: torch.device) -> ProbeReading | None:
        """One pass in evaluation mode (collective); None where nothing was collected on some rank."""
        if not self._everywhere():
            return None
        shape = self._ids.shape
        with torch.no_grad(), _looking(module, blocks) as look:
            output = self._forward(module, device)
        routes = {
            (i, j): look.routes[bank.deepspeed_moe].view(shape).cpu()
            for i, block in enumerate(blocks)
            for j, bank in enumerate(block.banks)
            if bank.deepspeed_moe in look.routes and look.routes[bank.deepspeed_moe].numel() == shape.numel()
        }
        return ProbeReading(self._losses(output, self._ids), routes, self.real)

    def read_by_ids(self, blocks: Mapping[int, Block]) -> ProbeReading:
        """What tables of token ids say of the set's tokens, without a pass and without losses.

        Args:
            blocks: by their number, blocks whose banks are all routed by such tables alone.
        """
        state, ids = self._state(), self._ids
        routes = {}
        for i, block in blocks.items():
            for j, bank in enumerate(block.banks):
                tokens = state.tokens((*ids.shape, block.hidden_size), bank.gate.key.remembers)
                # Of features such a key reads the number.
                routes[i, j] = bank.gate.key.choose(torch.empty(ids.numel(), 0), tokens).view(ids.shape).cpu()
        return ProbeReading(None, routes, self.real)

    @property
    def domain(self) -> Tensor:
        """(S,) source of each of this rank's sequences, -1 where unknown or for a filler."""
        rows = self._rows
        return torch.where(self._valid, rows.domain, -1) if rows else torch.empty(0, dtype=torch.int64)

    @property
    def number(self) -> Tensor:
        """(S,) number in the set of each of this rank's sequences, however they are shared out; -1 for a filler."""
        rows = self._rows
        return torch.where(self._valid, rows.number, -1) if rows else torch.empty(0, dtype=torch.int64)

    @property
    def real(self) -> Tensor:
        """(S, T) bool: tokens that count; neither padding nor fillers."""
        rows, shape = self._held, self._ids.shape
        real = self._state().counted((*shape, 1))
        valid = self._valid[:, None] & (torch.arange(shape[1]) < rows.length[:, None])
        return valid if real is None else valid & real

    @property
    def targets(self) -> Tensor:
        """(S, T) bool: places at which the loss of the next token counts.

        That token is real, of the same document, and its label was not -100.
        """
        real, counts = self.real, torch.zeros_like(self.real)
        inside = ~self._state().tokens((*real.shape, 1)).starts(real.device)[:, 1:]
        counts[:, :-1] = real[:, :-1] & real[:, 1:] & inside & self._held.labelled[:, 1:]
        return counts

    def _state(self) -> ForwardState:
        args, kwargs = self._held.call
        return ForwardState.of_call(dict(kwargs), args[0] if args else None, self._eod_id)

    def read_gradient(self, module: nn.Module, blocks: list[Block], device: torch.device) -> ProbeGradient | None:
        """One pass with a graph (collective); None where :meth:`read` gives none, or where there are no logits."""
        if not self._everywhere():
            return None
        args, kwargs = self._held.call
        shape = self._ids.shape

        def cut(value: Any) -> Any:
            long = isinstance(value, Tensor) and value.shape[:2] == shape
            return value[:, :GRADIENT_TOKENS] if long else value

        part = ([cut(value) for value in args], {name: cut(value) for name, value in kwargs.items()})
        ids = ids_of(part)
        # Neither rows of padding nor those of sequences that only keep company count.
        real = self.real[:, :GRADIENT_TOKENS]
        number = torch.where(real, self.number[:, None], -1)
        # Counted among real tokens: how far a sequence is padded depends on what it is batched with.
        places = torch.stack([number, (real.long().cumsum(dim=1) - 1).clamp(min=0)], dim=-1)
        with torch.enable_grad(), _looking(module, blocks, places.to(device)) as look:
            logits = _logits(self._forward(module, device, part), ids)
            if logits is None:
                return None
            target = torch.full_like(ids, -100)
            target[:, :-1] = torch.where(self.targets[:, : ids.shape[1] - 1], ids[:, 1:], -100)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten().to(logits.device), reduction="sum")
            found = {}
            for i, block in enumerate(blocks):
                found[i, -1] = [places.flatten(0, 1)]
                for place, bank in enumerate(block.banks):
                    read = look.rows.get(bank.deepspeed_moe, {})
                    found.update({(i, place * bank.num_experts + k): rows for k, rows in read.items()})
            return ProbeGradient(loss, found)

    def count(self) -> int:
        """Tokens of the set over all ranks, without padding (collective); 0 where it is not complete."""
        if not self._everywhere():
            return 0
        return int(sum_over_ranks(self.real.sum(), self._mesh.data))

    def _everywhere(self) -> bool:
        return not int(max_over_ranks(torch.tensor(0 if self.complete else 1), self._mesh.world))

    def _forward(self, module: nn.Module, device: torch.device, part: Call | None = None) -> Any:
        args, kwargs = part or self._held.call
        with forward_pass(module):
            return module(*[_to(v, device) for v in args], **{name: _to(v, device) for name, v in kwargs.items()})

    def state_dict(self) -> dict[str, Any] | None:
        """Plain values of this rank; None where nothing was collected."""
        if not self.complete:
            return None
        rows = self._held
        facts = {"valid": self._valid, "domain": rows.domain, "number": rows.number, "length": rows.length}
        return {"args": list(rows.call[0]), "kwargs": dict(rows.call[1]), "labelled": rows.labelled, **facts}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`state_dict` returned."""
        if state is None:
            return
        call = (list(state["args"]), dict(state["kwargs"]))
        shape, data = ids_of(call).shape, self._mesh.data
        # What older checkpoints have not; of numbers any will do that no other rank has.
        labelled = state.get("labelled", torch.ones(shape, dtype=torch.bool))
        number = state.get("number", data.rank + data.size * torch.arange(shape[0]))
        length = state.get("length", torch.full((shape[0],), shape[1]))
        self._rows, self._valid = Rows(call, state["domain"], number, labelled, length), state["valid"]

    def _losses(self, output: Any, ids: Tensor) -> Tensor | None:
        logits = _logits(output, ids)
        if logits is None:
            return None
        losses = torch.full(ids.shape, math.nan, dtype=torch.float64)
        for row in range(ids.shape[0]):  # one sequence's logits in fp32 at a time
            target = ids[row, 1:].to(logits.device)
            losses[row, :-1] = F.cross_entropy(logits[row, :-1].float(), target, reduction="none").double().cpu()
        losses[~self.targets] = math.nan
        return losses

    @property
    def _held(self) -> Rows:
        assert self._rows is not None  # who asks has seen that the set is complete
        return self._rows

    @property
    def _ids(self) -> Tensor:
        return ids_of(self._held.call)


@contextmanager
def _looking(module: nn.Module, blocks: list[Block], places: Tensor | None = None) -> Iterator[RouteObserver]:
    """Evaluation mode with routes recorded; afterwards everything is as it was."""
    training, look = module.training, RouteObserver(places)
    module.eval()
    try:
        with blocks[0].context.watched_by(look):
            yield look
    finally:
        module.train(training)


def _logits(output: Any, ids: Tensor) -> Tensor | None:
    """(S, T, V) of a model's output; None where it has none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.shape[:2] == ids.shape else None


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
