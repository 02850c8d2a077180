"""A set of experts, of which every token uses one or a few: DeepSpeed's MoE layer with a cluster gate, dropless."""

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from mocte_ds.config import MocteConfig, RouterConfig
from mocte_ds.moe.balance import Balance, with_loss
from mocte_ds.moe.context import BatchContext, ForwardState, Look
from mocte_ds.moe.dispatch import route_through
from mocte_ds.moe.expert_rows import ExpertRows
from mocte_ds.moe.gate import ClusterGate


class ClusterMOELayer(MOELayer):
    """DeepSpeed's MOELayer with our dispatch: the engine finds it, its groups and its experts by DeepSpeed's names."""

    def __init__(
        self, gate: ClusterGate, stock: MOELayer, context: BatchContext, expert_rows: ExpertRows | None
    ) -> None:
        super().__init__(gate, stock.experts, stock.ep_group_name, stock.ep_size, stock.num_local_experts)
        self.context, self.expert_rows = context, expert_rows
        num_experts = stock.ep_size * stock.num_local_experts
        # On the CPU also where a model is made on the meta device: no weights are ever loaded into these.
        self.routed = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
        self.step_load = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
        """(E,) the part of :attr:`routed` that the current optimizer step has added on this rank."""
        self.share = torch.full((num_experts,), 1.0 / num_experts, device="cpu")
        """(E,) share of the tokens that each expert got in the last optimizer step, all ranks together."""
        self.step_weight = torch.zeros(1, dtype=torch.float64, device="cpu")
        """(1,) sum of the weights of this rank's tokens in the current optimizer step; for `unit_mean`."""
        self.by_source: Tensor | None = None
        """(S, E) tokens of each source and expert while the controller samples."""
        self.exp_counts: Tensor | None = None
        """(E,) rows that the last forward pass sent to each expert, padding included."""

    def forward(self, hidden: Tensor, state: ForwardState, again: bool = False) -> Tensor:
        """Features (..., d) to outputs (..., d).

        Args:
            hidden: features.
            state: of the pass that they belong to.
            again: whether this is a recomputation, whose tokens have been counted already.
        """
        features = hidden.reshape(-1, hidden.shape[-1])
        counted = state.counted(hidden.shape)
        tokens = state.tokens(hidden.shape, self.gate.key.remembers)
        index, weight, loss = self.gate(features, tokens, self._balance(state, counted))
        if loss is not None and weight is not None and self.gate.balanced and self.training:
            weight = with_loss(weight, loss, state, self, self.context)
            if not again:
                state.losses[self] = state.losses.get(self, 0.0) + loss.detach()
        counts_now = state.counting and not again
        outputs, counts = route_through(
            features,
            index,
            weight,
            list(self.experts.deepspeed_experts),
            self.routed.numel(),
            self.ep_group,
            self.ep_size,
        )
        if counts_now:
            self._count(index, weight, counts, counted, state)
            if state.sampling and self.expert_rows is not None:
                self.expert_rows.offer(features, index, *state.places(hidden.shape, index.device))
        if state.look is not None and not again:
            self._record(index, state.look)
        self.exp_counts = counts
        return outputs.view_as(hidden)

    def _balance(self, state: ForwardState, counted: Tensor | None) -> Balance | None:
        if not self.gate.balanced:
            return None
        return Balance(state.shares.setdefault(self, self.share), counted, state.usual_tokens)

    def _count(
        self, index: Tensor, weight: Tensor | None, counts: Tensor, counted: Tensor | None, state: ForwardState
    ) -> None:
        """Tokens of each expert, and of each source where it is known; padding is left out."""
        experts = self.routed.numel()
        real = None if counted is None else counted.reshape(-1, 1).expand_as(index).to(index.device)
        if real is not None:
            counts = torch.bincount(index[real], minlength=experts)
        table, domain = None, state.domain
        if state.sampling and domain is not None and state.sources and len(index) % domain.numel() == 0:
            source = domain.to(index.device).repeat_interleave(len(index) // domain.numel())[:, None].expand_as(index)
            known = (source >= 0) & (source < state.sources)
            known = known if real is None else known & real
            cells = torch.bincount(source[known] * experts + index[known], minlength=state.sources * experts)
            table = cells.view(state.sources, experts)
        total = None
        if weight is not None and self.gate.router.unit_mean:
            given = weight.detach().double()
            total = (given if real is None else torch.where(real, given, 0.0)).sum() / self.gate.router.scale
        state.count(self, counts, table, total)

    def add_counts(self, counts: Tensor, table: Tensor | None, weight: Tensor | None = None) -> None:
        """Take what a pass has counted: (E,) tokens of each expert, (S, E) by source, () sum of the weights."""
        if weight is not None:
            self.step_weight += weight.to(self.step_weight.device)
        self.routed += counts.to(self.routed.device)
        self.step_load += counts.to(self.step_load.device)
        if table is not None:
            fits = self.by_source is not None and self.by_source.shape == table.shape
            self.by_source = table.cpu() + (self.by_source if fits else 0)

    def _record(self, index: Tensor, look: Look) -> None:
        look.routes[self] = index[:, 0]
        if look.places is not None and look.places.shape[:-1].numel() == len(index):
            look.rows[self] = self._record_places(index, look.places.flatten(0, -2).float())

    def _record_places(self, index: Tensor, places: Tensor) -> dict[int, Tensor]:
        """Send the tokens' places the way that their features took; by global expert, the places of its rows."""
        first = self.num_local_experts * dist.get_rank(group=self.ep_group) if self.ep_size > 1 else 0
        stand_ins = [nn.Identity() for _ in range(self.num_local_experts)]
        found: dict[int, Tensor] = {}

        def keep(expert: int, rows: Tensor) -> None:
            found[first + expert] = rows.round().long().cpu()

        experts, group = self.routed.numel(), self.ep_group
        route_through(places, index, None, stand_ins, experts, group, self.ep_size, keep)
        return found

    def clear_samples(self) -> None:
        """Forget rows and sources, so that the next check sees today's weights."""
        self.by_source = None
        if self.expert_rows is not None:
            self.expert_rows.clear()


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
        watched = config.freeze.policy != "off"
        rows = ExpertRows(config.num_experts, config.freeze.rows, config.seed) if watched else None
        self.deepspeed_moe = ClusterMOELayer(gate, self.deepspeed_moe, context, rows)
        for parameter in self.parameters():
            parameter.requires_grad_(False)  # dormant until emergence

    def forward(self, hidden: Tensor, state: ForwardState, again: bool = False) -> Tensor:
        """See :meth:`ClusterMOELayer.forward`."""
        return self.deepspeed_moe(hidden, state, again)

    @property
    def gate(self) -> ClusterGate:
        """The gate of this bank."""
        return self.deepspeed_moe.gate

    @property
    def local_experts(self) -> nn.ModuleList:
        """This rank's experts."""
        return self.deepspeed_moe.experts.deepspeed_experts

    def first_local(self, ep_rank: int) -> int:
        """Global number of the first expert that expert-parallel rank ``ep_rank`` holds."""
        return ep_rank * self.num_local_experts
