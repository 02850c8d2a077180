"""A set of experts, of which every token uses one or a few: DeepSpeed's MoE layer with a cluster gate, dropless."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.dist.mesh import ALONE, Axis
from mocte_ds.dist.rank_draws import draws_of_rank
from mocte_ds.dist.token_shares import TokenShares
from mocte_ds.moe.balance import Balance, with_loss
from mocte_ds.moe.context import BatchContext, ForwardState
from mocte_ds.moe.dispatch import route_through
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.moe.idle import leave_out_when_freed
from mocte_ds.moe.loads import Loads
from mocte_ds.router_config import RouterConfig
from mocte_ds.watch import part

EXPERTS = "deepspeed_moe.experts"
"""Path of a bank's experts in it."""
_MANY_ROWS = 1024
"""Rows of an expert from which on its second call costs less than waiting does (docs/results/speed.md)."""


class ClusterMOELayer(MOELayer):
    """DeepSpeed's MOELayer with our dispatch: the engine finds it, its groups and its experts by DeepSpeed's names."""

    def __init__(self, gate: ClusterGate, stock: MOELayer, context: BatchContext) -> None:
        super().__init__(gate, stock.experts, stock.ep_group_name, stock.ep_size, stock.num_local_experts)
        self.context, self.loads = context, Loads(stock.ep_size * stock.num_local_experts)
        self.tensor: Axis = ALONE
        """Ranks that read the same tokens; each sends its share of them to the experts."""
        self.early: int | None = None
        """Of the last forward pass, see :func:`route_through`."""
        self.exp_counts: Tensor | None = None
        """(E,) rows that the last forward pass sent to each expert, padding included."""

    def choose(
        self, hidden: Tensor, counted: Tensor | None, state: ForwardState, again: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The experts (T, k) int64 of the T tokens of features (..., d), and their weights (T, k) in fp32; None: 1.

        Args:
            hidden: features.
            counted: False for padding, or None; see :meth:`ForwardState.counted`.
            state: of the pass that they belong to.
            again: whether this is a recomputation, whose tokens have been counted already.
        """
        tokens = state.tokens(hidden.shape, self.gate.key.remembers)
        self.gate.key.counting = state.counting and not again
        index, weight, loss = self.gate(hidden.reshape(-1, hidden.shape[-1]), tokens, self._balance(state, counted))
        self.gate.key.counting = False
        if loss is not None and weight is not None and self.gate.balanced and self.training:
            weight = with_loss(weight, loss, state, self, self.context)
            if not again:
                state.losses[self] = state.losses.get(self, 0.0) + loss.detach()
        return index, weight

    def _balance(self, state: ForwardState, counted: Tensor | None) -> Balance | None:
        if not self.gate.balanced:
            return None
        return Balance(state.shares.setdefault(self, self.loads.share), counted, state.usual_tokens)

    def count(
        self, index: Tensor, weight: Tensor | None, counts: Tensor, counted: Tensor | None, state: ForwardState
    ) -> None:
        """Count tokens of each expert, and the sum of their weights where the gate asks; padding is left out.

        Args:
            index: from :meth:`choose`.
            weight: from there.
            counts: (E,) int64 choices of each expert by this rank's tokens.
            counted: as there.
            state: as there.
        """
        real = None if counted is None else counted.reshape(-1, 1).expand_as(index).to(index.device)
        if real is not None:
            counts = torch.bincount(index[real], minlength=len(counts))
        total = None
        if weight is not None and self.gate.router.unit_mean:
            given = weight.detach().double()
            total = (given if real is None else torch.where(real, given, 0.0)).sum() / self.gate.router.scale
        key = self.gate.key
        sums = key.take_sums(index, None if real is None else real[:, 0]) if key.moves else None
        state.count(self, counts, total, sums)

    def rows_of_experts(self, index: Tensor, facts: Tensor) -> dict[int, list[Tensor]]:
        """Send integers of each token the way that its features took (collective over the ranks that share the bank).

        Args:
            index: (T, k) experts of each token.
            facts: (T, c) integers below 2**24.

        Returns:
            By global expert of this rank, for each of its calls (m, c) int64, those of the rows that it read.
        """
        first = self.num_local_experts * dist.get_rank(group=self.ep_group) if self.ep_size > 1 else 0
        stand_ins = [nn.Identity() for _ in range(self.num_local_experts)]
        found: dict[int, list[Tensor]] = {}

        def keep(expert: int, rows: Tensor) -> None:
            found.setdefault(first + expert, []).append(rows.detach().round().long().cpu())

        experts, group = len(self.loads.total), self.ep_group
        if self.tensor.size > 1:
            shares = TokenShares.of(self.tensor, len(index))
            index, facts = shares.own(index), shares.own(facts)
        route_through(facts.float(), index, None, stand_ins, experts, group, self.ep_size, keep, early=self.early)
        return found


class Bank(MoE):
    """E experts, of which each token uses one or a few; a block adds up its banks."""

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        config: MocteConfig,
        router: RouterConfig,
        context: BatchContext,
        vocab_size: int | None,
    ) -> None:
        """Copy ``expert`` to every local slot.

        Args:
            hidden_size: d.
            expert: the module that every slot starts from.
            config: the "mocte" block.
            router: of this bank.
            context: shared by all blocks of the model.
            vocab_size: entries of a routing table.
        """
        super().__init__(hidden_size, expert, config.num_experts, config.ep_size, k=1, drop_tokens=False)
        gate = ClusterGate(hidden_size, config.num_experts, router, vocab_size)
        self.deepspeed_moe = ClusterMOELayer(gate, self.deepspeed_moe, context)
        for parameter in self.parameters():
            parameter.requires_grad_(False)  # dormant until emergence
        leave_out_when_freed(self, EXPERTS)

    def forward(self, hidden: Tensor, state: ForwardState, again: bool = False) -> Tensor:
        """The bank alone; see :func:`run_banks`."""
        return run_banks([self], hidden, state, again)

    @property
    def gate(self) -> ClusterGate:
        """The gate of this bank."""
        return self.deepspeed_moe.gate

    @property
    def loads(self) -> Loads:
        """Tokens of its experts, on this rank."""
        return self.deepspeed_moe.loads

    @property
    def experts(self) -> nn.Module:
        """DeepSpeed's module around this rank's experts."""
        return self.deepspeed_moe.experts

    @property
    def local_experts(self) -> nn.ModuleList:
        """This rank's experts."""
        return self.experts.deepspeed_experts

    def first_local(self, ep_rank: int) -> int:
        """Global number of the first expert that expert-parallel rank ``ep_rank`` holds."""
        return ep_rank * self.num_local_experts


def run_banks(
    banks: Sequence[Bank],
    hidden: Tensor,
    state: ForwardState,
    again: bool = False,
    beside: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Features (..., d) to the sum of what each bank makes of them, (..., d); a token's rows for all banks go together.

    Args:
        banks: of one block.
        hidden: features.
        state: of the pass that they belong to.
        again: whether this is a recomputation, whose tokens have been counted already.
        beside: makes (..., d) that are added, of ``hidden`` too; it has time while rows travel.
    """
    layers, counted = [bank.deepspeed_moe for bank in banks], state.counted(hidden.shape)
    with part("gate"):
        found = [layer.choose(hidden, counted, state, again) for layer in layers]
    first, total = layers[0], sum(bank.num_experts for bank in banks)
    local, weights = first.num_local_experts, [weight for _, weight in found]
    # Numbered by rank, then bank: a rank's experts stand together.
    places = [index + (index // local * (len(banks) - 1) + b) * local for b, (index, _) in enumerate(found)]
    weight = None
    if any(w is not None for w in weights):
        weight = torch.cat([i.new_ones(i.shape, dtype=torch.float32) if w is None else w for i, w in found], dim=1)
    features, index = hidden.reshape(-1, hidden.shape[-1]), torch.cat(places, dim=1)
    experts = [expert for layer in layers for expert in layer.experts.deepspeed_experts]
    early = len(experts) // 2 if _pays_to_stay(first, index, experts) else None
    for number, layer in enumerate(layers):
        layer.early = None if early is None else min(max(early - number * local, 0), local)
    if first.tensor.size == 1:
        outputs, counts, added = route_through(
            features, index, weight, experts, total, first.ep_group, first.ep_size, beside=beside, early=early
        )
    else:
        added = beside() if beside else None  # not among what each of the ranks draws for itself
        shares, counts = TokenShares.of(first.tensor, len(features)), torch.bincount(index.flatten(), minlength=total)
        own, own_weight = shares.take(features, weight)
        # Experts with dropout draw for the tokens that they get: other amounts on each rank.
        place = f"{first.gate.key.name} {state.first_sequence}"
        with draws_of_rank(first.tensor, place) if first.training else contextlib.nullcontext():
            made, *_ = route_through(
                own, shares.own(index), own_weight, experts, total, first.ep_group, first.ep_size, early=early
            )
        outputs = shares.join(made)
    by_bank = counts.view(first.ep_size, len(banks), local).transpose(0, 1).flatten(1)
    for layer, (index, own_weight), own_counts in zip(layers, found, by_bank, strict=True):
        layer.exp_counts = own_counts
        if again:
            continue
        if state.counting:
            layer.count(index, own_weight, own_counts, counted, state)
        if state.observer is not None:
            state.observer.routed(layer, hidden, index, state)
    outputs = outputs.view_as(hidden)
    return outputs if added is None else added + outputs


def _pays_to_stay(layer: ClusterMOELayer, index: Tensor, experts: Sequence[nn.Module]) -> bool:
    """Whether a rank's tokens of its own experts stay there, and are computed while the others travel.

    Each expert is then called twice, on fewer rows, for which a GPU is too fast. Under ZeRO-3 all ranks that share an
    expert gather it at each call, and they may have other numbers of rows.
    """
    if layer.ep_size == 1 or index.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    gathered = any(hasattr(parameter, "ds_tensor") for parameter in experts[0].parameters())
    return not gathered and index.numel() > _MANY_ROWS * len(experts)
