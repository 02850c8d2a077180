"""Which megatron-core GPTModel computes what a run's model computes, as settings that a training script can take."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.experts import GATE
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block

# megatron-core weighs top-1 by the softmax probability and by nothing else. Logits this much larger make it exactly 1
# wherever two of ours differ by 2e-11 or more; a power of two changes no bit of the router's directions.
_HARD = 2.0**40


@dataclass(frozen=True)
class Settings:
    """Arguments of megatron-core's classes; plain values."""

    transformer_config: dict[str, Any]
    """Of TransformerConfig, besides ``activation_func=torch.nn.functional.silu``."""
    gpt_model: dict[str, Any]
    """Of GPTModel."""
    router_scale: float
    """Factor between our routers and those in the folder."""

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def settings_of(source: Source) -> Settings:
    """The model that computes the same.

    Raises:
        CheckpointError: there is none; says which setting stands in the way.
    """
    config, blocks = source.config, source.emerged
    if config.style != "llama":
        raise CheckpointError(
            f"model.style '{config.style}' cannot be converted to megatron-core; only 'llama' can be."
        )
    usual = {"qk_norm": False, "head_norm": False, "rotary_share": 1.0, "rope_scaling": None, "ffn_sizes": None}
    for name, value in {**usual, "sliding_window": None}.items():
        if getattr(config, name) != value:
            raise CheckpointError(f"model.{name} = {getattr(config, name)!r} cannot be converted to megatron-core.")
    for block in blocks.values():
        _require_convertible(source, block)
    transformer = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.kv_heads,
        "kv_channels": config.head_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    scale = 1.0
    if blocks:
        first = next(iter(blocks.values()))
        router = first.banks[0].gate.router
        scale = _HARD if router.weight == "hard" else 1.0
        transformer |= {
            "num_moe_experts": first.num_experts,
            "moe_ffn_hidden_size": config.intermediate_size,
            "moe_router_topk": router.top_k,
            # A softmax over the chosen alone is that over all, divided by the sum of the chosen.
            "moe_router_pre_softmax": not router.normalise,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
        }
        if len(blocks) < config.num_layers:
            transformer["moe_layer_freq"] = [int(i in blocks) for i in range(config.num_layers)]
    model = {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_positions,
        "position_embedding_type": "rope",
        "rotary_base": config.rope_theta,
        "share_embeddings_and_output_weights": config.tied,
    }
    return Settings(transformer, model, scale)


def build(settings: Settings, **changes: Any) -> nn.Module:
    """The model in fp32 on a CPU, in evaluation mode, its weights not set (within the groups of megatron-core).

    Args:
        settings: of the model.
        **changes: of TransformerConfig, such as expert_model_parallel_size.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    # The other dispatchers need CUDA's streams.
    config = TransformerConfig(
        **settings.transformer_config,
        activation_func=F.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        moe_token_dispatcher_type="allgather",
        **changes,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(config, spec, **settings.gpt_model).eval()


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of ids (B, T), in evaluation mode, on a CPU."""
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(ids, positions, future)


def _require_convertible(source: Source, block: Block) -> None:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{block.name} has {what}, which megatron-core's router and experts do not have; for a conversion, "
            "train with experts of the kind 'ffn', one bank, router.kind 'token' or 'random', and router.bias false."
        )

    if block.kind != "ffn":
        raise refuse(f"experts of the kind '{block.kind}'")
    if len(block.banks) != 1:
        raise refuse(f"{len(block.banks)} banks of experts")
    router = block.banks[0].gate.router
    if not block.banks[0].gate.key.stock:
        raise refuse(f"the router.kind '{router.kind}'")
    if router.weight == "sigmoid":
        raise refuse("the router.weight 'sigmoid'")
    if router.unit_mean:
        raise refuse("router.unit_mean")
    # The same bias for all experts changes neither the choice nor the softmax.
    bias = source.read(f"{GATE.format(block=block.name)}key.cluster_bias")
    if (bias != bias[0]).any():
        raise refuse("a gate with a bias")
