"""Mixture layers that compute the same products on the same tokens, ours and those of others."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.config import MocteConfig
from mocte_ds.moe import BlockMode, attach

LOADS = ("even", "zipf", "one-empty")
_SHARP = 20.0
"""By how much a token's own expert stands out of its feature: no rounding sends it elsewhere."""

# Shapes: T tokens, d features, f hidden units, E experts.


@dataclass(frozen=True)
class LayerSizes:
    """A mixture layer and what it reads."""

    d: int
    width: int
    experts: int
    """E, all ranks together."""
    tokens: int
    """T, of each rank."""
    ep: int
    dtype: str
    loads: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and features."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def rows(self) -> list[int]:
        """Tokens of each expert, T together."""
        share = torch.ones(self.experts, dtype=torch.float64)
        if self.loads == "zipf":
            share = 1.0 / torch.arange(1, self.experts + 1, dtype=torch.float64)
        if self.loads == "one-empty":
            share[-1] = 0.0
        ends = (share.cumsum(0) / share.sum() * self.tokens).round().long()
        return ends.diff(prepend=ends.new_zeros(1)).tolist()


def tokens_and_gate(sizes: LayerSizes, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (1, T, d) in random order whose experts a linear gate (E, d) finds with the loads of ``sizes``."""
    common = torch.Generator().manual_seed(0)
    gate = torch.linalg.qr(torch.randn(sizes.d, sizes.experts, generator=common))[0].T.contiguous()
    generator = torch.Generator().manual_seed(1 + rank)
    expert = torch.arange(sizes.experts).repeat_interleave(torch.tensor(sizes.rows()))
    expert = expert[torch.randperm(len(expert), generator=generator)]
    features = torch.randn(sizes.tokens, sizes.d, generator=generator)
    features = features - features @ gate.T @ gate + _SHARP * gate[expert]
    return features[None].to(device, sizes.torch_dtype), gate.to(device)


def make_arms(sizes: LayerSizes, gate: Tensor, device: torch.device) -> dict[str, nn.Module]:
    """The layers by name, with weights of their own, which are the same numbers in `autoep` and `mixtral`.

    Args:
        sizes: of all of them.
        gate: (E, d) from :func:`tokens_and_gate`.
        device: where they run.
    """
    local = sizes.experts // sizes.ep
    even = LayerSizes(**{**sizes.to_dict(), "loads": "even", "experts": local})
    arms: dict[str, nn.Module] = {"dense": _ffn(sizes), "slices": _Slices(sizes, even.rows())}
    if sizes.ep == 1:
        arms["given_loads"], arms["grouped"] = _Slices(sizes, sizes.rows()), _Grouped(sizes, gate)
    arms["block"] = _block(sizes, gate, {"kind": "token"})
    arms["block_learned"] = _block(sizes, gate, {"kind": "random", "weight": "softmax", "learn": True, "aux": 0.0})
    arms["deepspeed"], arms["deepspeed_no_drop"] = _deepspeed(sizes, gate, True), _deepspeed(sizes, gate, False)
    arms["autoep"] = _autoep(sizes, gate, device)
    if sizes.ep == 1:
        arms["mixtral"] = _First(_mixtral(sizes, gate).model.layers[0].mlp)
    for arm in arms.values():
        arm.to(device, sizes.torch_dtype).train()
    return arms


def _ffn(sizes: LayerSizes) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(LlamaConfig(hidden_size=sizes.d, intermediate_size=sizes.width))


class _Slices(nn.Module):
    """FFNs on consecutive rows."""

    def __init__(self, sizes: LayerSizes, rows: list[int]) -> None:
        super().__init__()
        self.rows, self.ffns = rows, nn.ModuleList([_ffn(sizes) for _ in rows])

    def forward(self, hidden: Tensor) -> Tensor:
        chunks = hidden[0].split(self.rows)
        return torch.cat([ffn(chunk) for ffn, chunk in zip(self.ffns, chunks, strict=True)])[None]


class _Grouped(nn.Module):
    """The shortest mixture: argmax, sort, torch's grouped products, and back."""

    def __init__(self, sizes: LayerSizes, gate: Tensor) -> None:
        super().__init__()
        self.register_buffer("gate", gate)
        shape = (sizes.experts, sizes.d, sizes.width)
        self.up, self.into = (nn.Parameter(0.02 * torch.randn(shape)) for _ in range(2))
        self.down = nn.Parameter(0.02 * torch.randn(sizes.experts, sizes.width, sizes.d))

    def forward(self, hidden: Tensor) -> Tensor:
        order = (hidden[0] @ self.gate.T).argmax(dim=-1)
        expert, order = order.sort()
        ends = torch.bincount(expert, minlength=len(self.up)).cumsum(0).int()
        rows = hidden[0][order]
        units = F.silu(F.grouped_mm(rows, self.into, offs=ends)) * F.grouped_mm(rows, self.up, offs=ends)
        return F.grouped_mm(units, self.down, offs=ends)[order.argsort()][None]


class _First(nn.Module):
    """The first of a layer's results."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden)
        return output[0] if isinstance(output, tuple) else output


def _block(sizes: LayerSizes, gate: Tensor, router: dict[str, Any]) -> nn.Module:
    holder = _First(_ffn(sizes))
    values = {"modules": "layer", "num_experts": sizes.experts, "ep_size": sizes.ep, "auto": False, "router": router}
    (block,) = attach(holder, MocteConfig.from_dict(values))
    (bank,) = block.banks
    bank.set_deepspeed_parallelism(use_data_before_expert_parallel_=False)
    bank.gate.key.set(gate.cpu(), torch.zeros(sizes.experts))
    block.mode = BlockMode.SPECIALISING
    block.dense.requires_grad_(False)
    bank.requires_grad_(True)
    return holder


def _deepspeed(sizes: LayerSizes, gate: Tensor, drop: bool) -> nn.Module:
    from deepspeed.moe.layer import MoE

    layer = MoE(
        sizes.d, _ffn(sizes), sizes.experts, sizes.ep, k=1, capacity_factor=1.25, drop_tokens=drop, use_rts=False
    )
    layer.set_deepspeed_parallelism(use_data_before_expert_parallel_=False)
    layer.deepspeed_moe.gate.wg.weight.data.copy_(gate)
    return _First(layer)


def _autoep(sizes: LayerSizes, gate: Tensor, device: torch.device) -> nn.Module:
    """What DeepSpeed's AutoEP puts in the place of the Mixtral block."""
    import torch.distributed as dist
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.ops.triton_ops import is_triton_available

    model = _mixtral(sizes, gate)
    # Where there is a GPU, silu beside the grouped products is a Triton kernel, for tensors on the CPU too; the loop's
    # is PyTorch's.
    grouped = device.type != "cpu" or not is_triton_available()
    settings = parse_autoep_config(
        {"enabled": True, "autoep_size": sizes.ep, "preset_model": "mixtral", "use_grouped_mm": grouped}
    )
    (spec,) = AutoEP(model, settings).ep_parser()
    # Not by replace_moe_layers, which fails in the recorders of this version of transformers.
    rank = dist.get_rank() % sizes.ep
    layer = AutoEPMoELayer(spec, model.model.layers[0].mlp, sizes.ep, rank, settings)
    layer.set_deepspeed_parallelism(use_data_before_expert_parallel_=False)
    return _First(layer)


def _mixtral(sizes: LayerSizes, gate: Tensor) -> nn.Module:
    """A model of transformers with one layer, whose mixture is of the sizes and has the gate."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=sizes.d,
        intermediate_size=sizes.width,
        num_local_experts=sizes.experts,
        num_experts_per_tok=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
        vocab_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same on all ranks: AutoEP keeps each rank's part of the experts
        model = MixtralForCausalLM(config)
        layer = model.model.layers[0].mlp
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
    layer.gate.weight.data.copy_(gate)
    return model
