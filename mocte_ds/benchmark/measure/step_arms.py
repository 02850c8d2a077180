"""Engines that train the same model: dense, with blocks of ours, and with DeepSpeed's mixture layers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mocte_ds
from mocte_ds.moe.attach import find_ffns
from mocte_ds.training.model import TransformersModel, make_model
from mocte_ds.training.presets import preset

AUX = 0.01
"""Weight of DeepSpeed's loss for even loads, as Switch was published with."""


@dataclass(frozen=True)
class StepSizes:
    """A training step."""

    preset: str
    """Size of the dense model."""
    context: int
    micro_batch: int
    """Sequences per rank and step."""
    experts: int
    ep: int
    ranks: int
    stage: int
    dtype: str

    @property
    def model(self) -> TransformersModel:
        """The dense model."""
        return TransformersModel(hf={**preset(self.preset), "use_cache": False})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def config(self, mocte: dict[str, Any] | None = None) -> dict[str, Any]:
        """The DeepSpeed config of all arms; a rate that leaves the loads where they were."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": self.dtype == "bf16"},
            "zero_optimization": {"stage": self.stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True, "fused": True}},
            **({} if mocte is None else {"mocte": mocte}),
        }


@dataclass
class Arm:
    """An engine and what it minimises."""

    engine: Any
    added: Callable[[], Tensor | float]
    """Loss beside the cross-entropy, read after the forward pass."""

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of (B, T + 1) token ids, and what is added."""
        logits = self.engine(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()) + self.added()

    def loads(self) -> list[list[int]] | None:
        """(blocks, experts) tokens of the last step over all ranks; None where nothing counts them."""
        return self.engine.mocte.expert_load() if hasattr(self.engine, "mocte") else None


def make_arms(sizes: StepSizes) -> dict[str, Arm]:
    """The engines by name; those of ours are in warm-up."""
    common = {"modules": "auto", "num_experts": sizes.experts, "ep_size": sizes.ep, "auto": False, "total_steps": 1000}
    hashes = [{"kind": "hash"}, {"kind": "hash"}]
    ours = {
        "warmup": common,
        "hash": {**common, "router": {"kind": "hash"}},
        "token": {**common, "router": {"kind": "token"}},
        "banks": {**common, "banks": hashes},
        "lora": {**common, "router": {"kind": "hash"}, "expert": {"kind": "lora"}},
    }
    arms = {"dense": _deepspeed(sizes, experts=False)}
    arms |= {name: Arm(_ours(sizes, block), float) for name, block in ours.items()}
    return {**arms, "deepspeed": _deepspeed(sizes, experts=True)}


def _model(sizes: StepSizes) -> nn.Module:
    torch.manual_seed(0)
    return make_model(sizes.model)


def _ours(sizes: StepSizes, mocte: dict[str, Any]) -> Any:
    return mocte_ds.initialize(model=_model(sizes), config=sizes.config(mocte))[0]


def _deepspeed(sizes: StepSizes, experts: bool) -> Arm:
    """Plain DeepSpeed; with Switch's layer in place of each FFN as DeepSpeed has it: capacity 1.25, weight p."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model, layers = _model(sizes), []
    if experts:
        for name in find_ffns(model):
            ffn, d = model.get_submodule(name), sizes.model.config.hidden_size
            layer = MoE(d, ffn, sizes.experts, sizes.ep, k=1, capacity_factor=1.25)
            layers.append(_Output(layer))
            model.set_submodule(name, layers[-1])
    groups: Any = {"params": list(model.parameters()), "name": "all"}
    if experts:
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups if experts else None, config=sizes.config())
    return Arm(engine, lambda: AUX * sum(layer.loss for layer in layers))


class _Output(nn.Module):
    """A layer of DeepSpeed where a model expects an FFN."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.loss: Tensor | float = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        """Features (..., d) to outputs (..., d)."""
        output, self.loss, _ = self.layer(hidden)
        return output
