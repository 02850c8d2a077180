"""The block that stands for a dense FFN in an exported model; needs torch alone."""

import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .calls_mocte import Call
from .experts_mocte import expert_like, gather
from .gates_mocte import Gate
from .tokens_mocte import RoutingError
from .user_keys_mocte import KEYS

# Shapes: B sequences of T tokens, n = B T rows, d features, E experts, k experts per token.


class Running:
    """The call that a model is in, for each thread that calls it; one object is shared by all of its blocks."""

    def __init__(self) -> None:
        self._calls = threading.local()

    @property
    def call(self) -> Call | None:
        """None: this thread does not call the model."""
        return getattr(self._calls, "call", None)

    @call.setter
    def call(self, call: Call | None) -> None:
        self._calls.call = call

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copied or pickled model is in no call

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._calls = threading.local()


class MocteBank(nn.Module):
    """Experts of which each token uses one or a few."""

    def __init__(self, ffn: nn.Module, block: dict[str, Any], number: int) -> None:
        """Make the gate and the experts, still to be filled.

        Args:
            ffn: the dense FFN that the experts are like.
            block: of the config, see :class:`MocteBlocksConfig`.
            number: of the bank.
        """
        super().__init__()
        bank = block["banks"][number]
        router = SimpleNamespace(**bank)
        key = KEYS[router.kind].of(router, block["hidden_size"], block["num_experts"], block["vocab_size"])
        key = key.float()  # weights are loaded in the type that they have here, which else is the model's
        key.name = f"{block['module']}.{number}"
        self.gate = Gate(key, router)
        sizes = block["expert_sizes"]
        self.experts = nn.ModuleList([expert_like(ffn, sizes) for _ in range(block["num_experts"])])

    def forward(self, features: Tensor, call: Call, shape: torch.Size) -> Tensor:
        """Outputs (n, d) of features (n, d) that had the shape (..., d)."""
        tokens = call.tokens(shape, self.gate.key.remembers)
        index, weight, _ = self.gate.choose(features, tokens)
        if call.router_logits is not None:
            call.router_logits.append(self.gate.compared(features, tokens))
        output = torch.zeros_like(features)
        for k in index.unique().tolist():
            places = index == k
            chosen = places.any(dim=-1)
            added = self.experts[k](features[chosen])
            added = added[0] if isinstance(added, tuple) else added
            if weight is not None:
                added = (added * (weight * places).sum(dim=-1)[chosen][:, None]).to(added.dtype)
            output[chosen] = output[chosen] + added
        return output


class MocteBlock(nn.Module):
    """The sum of its banks, beside the dense FFN for the kind `lora`."""

    def __init__(self, ffn: nn.Module, block: dict[str, Any], running: Running) -> None:
        """Take the place of ``ffn``; arguments as of :class:`MocteBank`, and the call that the model is in."""
        super().__init__()
        self.running = running
        self.has_dense = block["kind"] == "lora"
        if self.has_dense:
            self.dense = ffn
        self.banks = nn.ModuleList([MocteBank(ffn, block, number) for number in range(len(block["banks"]))])

    def forward(self, hidden: Tensor) -> Tensor:
        """Features (..., d) to outputs (..., d).

        Raises:
            RoutingError: a part of the model is called by itself, and a router needs to know of the whole call.
        """
        call = self.running.call
        if call is None:
            keys = [type(bank.gate.key) for bank in self.banks]
            if any(key.reads_ids or key.remembers for key in keys):
                raise RoutingError("its routers need token ids and padding: call the whole model, with input_ids.")
            call = Call()
        features = hidden.reshape(-1, hidden.shape[-1])
        output: Tensor | None = self.dense(hidden).reshape(features.shape) if self.has_dense else None
        for bank in self.banks:
            added = bank(features, call, hidden.shape)
            output = added if output is None else output + added
        assert output is not None  # a block has at least one bank
        return output.view_as(hidden)


def put_blocks(model: nn.Module, blocks: list[dict[str, Any]]) -> Running:
    """Replace FFNs of a model by blocks, still to be filled.

    Args:
        model: changed in place.
        blocks: of the config, see :class:`MocteBlocksConfig`.
    """
    running = Running()
    for block in blocks:
        if parts := block.get("parts"):
            ffn: nn.Module = gather(model.get_submodule(block["module"].rpartition(".")[0]), parts)
        else:
            ffn = model.get_submodule(block["module"])
        model.set_submodule(block["module"], MocteBlock(ffn, block, running))
    return running
