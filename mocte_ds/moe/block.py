"""The layer that takes the place of an FFN: dense in warm-up, experts after emergence."""

from enum import StrEnum
from functools import partial

from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.moe.bank import EXPERTS, Bank, run_banks
from mocte_ds.moe.context import BatchContext, ForwardState
from mocte_ds.moe.experts import feature_size, make_expert
from mocte_ds.moe.ffn_shape import FFNSlice
from mocte_ds.moe.graph import tag_made, tag_read
from mocte_ds.moe.idle import leave_out_when_freed
from mocte_ds.remote_code.experts_mocte import GatheredFFN
from mocte_ds.watch import phase


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
        self.layer: int | None = None
        """Number of the layer that it lies in, from 0; see :func:`mocte_ds.moe.attach.layer_number`."""
        self.banks = nn.ModuleList()
        for number, router in enumerate(routers):
            part = FFNSlice(number, len(routers))
            expert = make_expert(
                ffn,
                config.expert.kind,
                config.expert.width,
                config.num_experts,
                name,
                part,
                redrawn=config.expert.redraw > 0,
            )
            self.banks.append(Bank(self.hidden_size, expert, config, router, context, vocab_size))
            self.banks[number].gate.key.name = f"{name}.{number}"
        leave_out_when_freed(self, "dense")

    @property
    def num_experts(self) -> int:
        """Experts of all banks together."""
        return sum(bank.num_experts for bank in self.banks)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What has weights beside the gates, by its path in the block: the dense FFN, and each bank's experts."""
        return {"dense": self.dense, **{f"banks.{b}.{EXPERTS}": bank.experts for b, bank in enumerate(self.banks)}}

    @property
    def names_outside(self) -> dict[str, str]:
        """Names of the dense FFN's tensors in the model, and those that they have in the model without blocks."""
        # What was gathered from a layer has the layer's names.
        path = self.name.rpartition(".")[0] if isinstance(self.dense, GatheredFFN) else self.name
        names = self.dense.state_dict()
        return {f"{self.name}.dense.{name}": f"{path}.{name}" if path else name for name in names}

    @property
    def idle(self) -> list[str]:
        """Paths of the parts that do not run: experts before their birth, the dense FFN that `ffn` experts replace."""
        if self.mode is BlockMode.WARMUP:
            return [path for path in self.parts if path != "dense"]
        return ["dense"] if self.kind == "ffn" else []

    def forward(self, hidden: Tensor) -> Tensor:
        """Features (..., d) to outputs (..., d)."""
        with self.context.block_runs(self, self.name) as (state, again):
            # The recomputation of what lies around the block finds the state by these tags.
            tag_read(hidden, state)
            hidden = hidden.view_as(hidden)
            tag_made(hidden, state)
            if not again:
                self._see(hidden.detach(), state)
            output = self._output(hidden, state, again)
            tag_made(output, state)
        return output

    def _see(self, hidden: Tensor, state: ForwardState) -> None:
        state.see_features(hidden)
        if state.observer is not None and state.first_visit(self):
            self._require_ids(state)
            state.observer.features(self, hidden, state)

    def _require_ids(self, state: ForwardState) -> None:
        """Refuse in warm-up what would stop the run at emergence, hours later."""
        reading = [bank.gate.router.kind for bank in self.banks if bank.gate.key.reads_ids]
        if reading and state.ids is None:
            raise ConfigError(
                f"router.kind '{reading[0]}' reads token ids, and the model was called without: call it with "
                "input_ids=(batch, length), or take a kind that reads features, such as 'token'."
            )

    def _output(self, hidden: Tensor, state: ForwardState, again: bool) -> Tensor:
        if self.mode is BlockMode.WARMUP:
            return self.dense(hidden)
        beside = partial(self.dense, hidden) if self.kind == "lora" else None
        with phase(f"experts of {self.name}"):
            return run_banks(list(self.banks), hidden, state, again, beside)

    def auxiliary_loss(self) -> Tensor | None:
        """The balance loss that the next backward pass adds, without a graph; None if there is none.

        Each forward pass carries its loss in its own graph, and brings it into the backward pass that runs through it.
        """
        layers = [bank.deepspeed_moe for bank in self.banks]
        pending = self.context.pending()
        losses = [state.losses[layer] for state in pending for layer in layers if layer in state.losses]
        return sum(losses[1:], losses[0]) if losses else None

    def extra_repr(self) -> str:
        return f"name={self.name}, mode={self.mode.value}, kind={self.kind}, num_experts={self.num_experts}"


def idle_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of tensors begin with that take no part in what a model computes, and are in no checkpoint."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return tuple(f"{block.name}.{path}." for block in blocks for path in block.idle)


def running_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model whose weights may lie elsewhere, without what does not run."""
    without = idle_prefixes(model)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(without)}
