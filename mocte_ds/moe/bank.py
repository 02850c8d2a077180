"""A set of experts, of which every token uses one or a few: DeepSpeed's MoE layer with a cluster gate, dropless."""

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from mocte_ds.config import MocteConfig, RouterConfig
from mocte_ds.moe.context import BatchContext
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
        self.routed = torch.zeros(num_experts, dtype=torch.int64)
        self.by_source: Tensor | None = None
        """(S, E) tokens of each source and expert while the controller samples."""
        self.recorded: Tensor | None = None
        """(T,) best expert of each token of the last forward that was recorded."""
        self.recorded_groups: dict[int, Tensor] = {}
        """Global expert to the groups of the rows that it read in that forward."""
        self._counted_step = -1
        self.l_aux: Tensor | None = None
        self.exp_counts: Tensor | None = None

    def forward(self, hidden: Tensor, _used_token: Tensor | None = None) -> Tensor:
        """Features (..., d) to outputs (..., d)."""
        features = hidden.reshape(-1, hidden.shape[-1])
        index, weight, loss = self.gate(features, self.context.tokens(hidden.shape, self.gate))
        self.l_aux = features.new_zeros(()) if loss is None else loss
        # A recomputation under activation checkpointing must not be counted a second time.
        first_time = self.training and self._counted_step != self.context.micro_step
        outputs, counts = route_through(
            _for_each(features, index),
            index.flatten(),
            list(self.experts.deepspeed_experts),
            self.routed.numel(),
            self.ep_group,
            self.ep_size,
        )
        if first_time:
            self._counted_step = self.context.micro_step
            self.routed += counts.to(self.routed.device)
            if self.context.sampling:
                self._count_sources(index)
                if self.expert_rows is not None:
                    length = hidden.shape[-2] if hidden.dim() > 1 else 1
                    self.expert_rows.offer(features, index, self.context.first_sequence, length)
        if self.context.recording:
            self.recorded = index[:, 0]
            if self.context.groups is not None and self.context.groups.numel() == len(index):
                self._record_groups(index, self.context.groups.reshape(-1, 1).float())
        if weight is not None:
            outputs = outputs * weight.to(outputs.dtype).reshape(-1, 1)
        if index.shape[1] > 1:
            outputs = outputs.view(*index.shape, -1).sum(dim=1)
        self.exp_counts = counts
        return outputs.view_as(hidden)

    def forget(self) -> None:
        """Drop what was recorded."""
        self.recorded, self.recorded_groups = None, {}

    def _record_groups(self, index: Tensor, groups: Tensor) -> None:
        """Send the tokens' groups the way that their features took."""
        first = self.num_local_experts * dist.get_rank(group=self.ep_group) if self.ep_size > 1 else 0
        stand_ins = [nn.Identity() for _ in range(self.num_local_experts)]

        def keep(expert: int, rows: Tensor) -> None:
            self.recorded_groups[first + expert] = rows[:, 0].round().long().cpu()

        groups = _for_each(groups, index)
        route_through(groups, index.flatten(), stand_ins, self.routed.numel(), self.ep_group, self.ep_size, keep)

    def clear_samples(self) -> None:
        """Forget rows and sources, so that the next check sees today's weights."""
        self.by_source = None
        if self.expert_rows is not None:
            self.expert_rows.clear()

    def _count_sources(self, index: Tensor) -> None:
        domain, sources, experts = self.context.domain, self.context.sources, self.routed.numel()
        if domain is None or not sources or len(index) % domain.numel():
            return
        source = domain.to(index.device).repeat_interleave(len(index) // domain.numel())
        known = (source >= 0) & (source < sources)
        cells = torch.bincount((source[known, None] * experts + index[known]).flatten(), minlength=sources * experts)
        table = cells.view(sources, experts).cpu()
        fits = self.by_source is not None and self.by_source.shape == table.shape
        self.by_source = self.by_source + table if fits else table


class Bank(MoE):
    """E experts, one or a few a token; a block adds up its banks."""

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


def _for_each(rows: Tensor, index: Tensor) -> Tensor:
    """(T k, ...) each of the rows (T, ...) once for each of its experts (T, k)."""
    return rows if index.shape[1] == 1 else rows.repeat_interleave(index.shape[1], dim=0)
