"""The layer that stands where an FFN stood: dense in warm-up, experts after emergence."""

from collections.abc import Callable
from enum import StrEnum

from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.errors import MocteError
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.context import BatchContext
from mocte_ds.moe.experts import Part, feature_size, make_expert


class BlockMode(StrEnum):
    """State of a block."""

    WARMUP = "warmup"
    """The dense FFN runs."""
    SPECIALISING = "specialising"
    """The experts run and at least one of them trains."""
    LOCKED = "locked"
    """The experts run and all of them are frozen."""


class ExpertMode(StrEnum):
    """State of an expert."""

    DORMANT = "dormant"
    TRAINING = "training"
    FROZEN = "frozen"


class Block(nn.Module):
    """An FFN that becomes a mixture of cluster-oriented experts.

    Warm-up: y = FFN(x). Afterwards, kind `ffn`: y = sum over banks of w E_k(x); kind `lora`: y = FFN(x) + the same.
    With B banks an `ffn` expert has 1/B of the FFN's hidden units: bank b's are born as copies of the b-th slice.
    """

    def __init__(
        self, name: str, ffn: nn.Module, config: MocteConfig, context: BatchContext, vocab_size: int | None
    ) -> None:
        """Wrap ``ffn``.

        Args:
            name: path of the FFN in the model.
            ffn: the dense FFN; it stays the block's `.dense`.
            config: the "mocte" block.
            context: shared by all blocks of the model.
            vocab_size: entries of a routing table.
        """
        super().__init__()
        self.name, self.kind, self.context = name, config.expert.kind, context
        self.hidden_size = feature_size(ffn, name)
        self.mode = BlockMode.WARMUP
        self.dense = ffn
        routers = config.routers
        self.banks = nn.ModuleList()
        for number, router in enumerate(routers):
            part = Part(number, len(routers))
            expert = make_expert(ffn, config.expert.kind, config.expert.width, config.num_experts, name, part)
            self.banks.append(Bank(self.hidden_size, expert, config, router, context, vocab_size))
        self.observe: Callable[[Tensor], None] | None = None
        self._observed_step = -1

    @property
    def num_experts(self) -> int:
        """Experts of all banks together."""
        return sum(bank.num_experts for bank in self.banks)

    def forward(self, hidden: Tensor) -> Tensor:
        """Features (..., d) to outputs (..., d)."""
        if self.observe is not None and self.training and self.context.sampling:
            if self._observed_step != self.context.micro_step:
                self._observed_step = self.context.micro_step
                self.observe(hidden.detach())
        if self.mode is BlockMode.WARMUP:
            return self.dense(hidden)
        output = self.dense(hidden) if self.kind == "lora" else None
        for bank in self.banks:
            added = bank(hidden)[0]
            output = added if output is None else output + added
        return output

    def auxiliary_loss(self) -> Tensor | None:
        """Loss of the last forward for even loads of learned routers; None where none learns.

        Raises:
            MocteError: the loss has no gradient although the router trains.
        """
        if self.mode is BlockMode.WARMUP:
            return None
        losses = []
        for bank in self.banks:
            if bank.gate.router.learn and bank.gate.router.aux:
                loss = bank.deepspeed_moe.l_aux
                if bank.gate.cluster_residual.requires_grad and not loss.requires_grad:
                    raise MocteError(
                        f"the loss for even loads of the learned router in {self.name} has no gradient: its forward "
                        "pass ran without a graph, as reentrant activation checkpointing does. Checkpoint with "
                        "use_reentrant=False."
                    )
                losses.append(loss)
        return sum(losses[1:], losses[0]) if losses else None

    def extra_repr(self) -> str:
        return f"name={self.name}, mode={self.mode.value}, kind={self.kind}, num_experts={self.num_experts}"
