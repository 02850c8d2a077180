"""What megatron-core's classes are told of a model of transformers: its config, key by key; the rest is refused."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mocte_ds.errors import CheckpointError
from mocte_ds.shown import shown


@dataclass(frozen=True)
class _Architecture:
    """What a class of transformers computes, besides what all of them do."""

    windows: str = "none"
    """Which layers have the window `sliding_window`: `none`, `all`, or those that `layer_types` names."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of TransformerConfig that no key decides."""
    wanted: dict[str, Any] = field(default_factory=dict)
    """Keys of its config with the one value that GPTModel computes."""


# The tensors of all of them have the same names (mocte_ds/convert/megatron/tensor_map.py).
_CLASSES = {
    "LlamaForCausalLM": _Architecture(wanted={"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": _Architecture("all"),
    "Qwen2ForCausalLM": _Architecture("layer_types", {"add_qkv_bias": True}),
    "Qwen3ForCausalLM": _Architecture("layer_types", {"qk_layernorm": True}, {"attention_bias": False}),
    # Of runs that started from such a folder: blocks stand in the place of their own experts.
    "MixtralForCausalLM": _Architecture("all"),
    "Qwen2MoeForCausalLM": _Architecture("layer_types"),
    "Qwen3MoeForCausalLM": _Architecture("all", {"qk_layernorm": True}, {"attention_bias": False}),
}
_READ = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
_READ |= {"num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"}
_READ |= {"attention_dropout", "rope_parameters", "sliding_window", "layer_types", "qkv_bias"}
_WITHOUT_EFFECT = {"initializer_range", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"}
_WITHOUT_EFFECT |= {"use_sliding_window", "max_window_layers"}  # their effect stands in sliding_window and layer_types
_WITHOUT_EFFECT |= {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}  # the run has
_WITHOUT_EFFECT |= {"shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}  # blocks of its own
_WITHOUT_EFFECT |= {"norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
# The only such values that megatron-core's GPTModel has (RotaryEmbedding._apply_scaling).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def arguments_of(architecture: str, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of TransformerConfig and of GPTModel that make the model without its experts.

    Args:
        architecture: name of the class.
        config: of its text model.

    Raises:
        CheckpointError: the class is not known, or GPTModel does not compute the value of a key; names it.
    """
    if architecture not in _CLASSES:
        raise CheckpointError(f"it holds a {architecture}; these can be converted: {', '.join(_CLASSES)}.")
    kind = _CLASSES[architecture]
    if getattr(config, "is_heterogeneous", False):
        raise _refusal("per_layer_config", config.per_layer_config, "all layers have one config there.")
    for key, wanted in kind.wanted.items():
        if (value := getattr(config, key)) != wanted:
            raise _refusal(key, value, f"{wanted!r} can be converted.")
    if config.hidden_act not in ("silu", "swish"):
        raise _refusal("hidden_act", config.hidden_act, "'silu' can be converted.")
    _require_known(config, kind)
    transformer = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": getattr(config, "qkv_bias", False),
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
    }
    model = {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
    }
    return {**transformer, **kind.settings, **_windows(config, kind)}, {**model, **_rotary(config.rope_parameters)}


def _require_known(config: Any, kind: _Architecture) -> None:
    """Refuse keys that a later version of transformers has added to the class, unless they have their default."""
    from transformers import PreTrainedConfig

    usual, common = type(config)(), {item.name for item in dataclasses.fields(PreTrainedConfig)}
    known = _READ | _WITHOUT_EFFECT | kind.wanted.keys() | (common - {"tie_word_embeddings"})
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name not in known and value != getattr(usual, item.name):
            raise _refusal(item.name, value, "this version of mocte_ds does not know the key.")


def _windows(config: Any, kind: _Architecture) -> dict[str, Any]:
    """Which layers attend to the last tokens only; a window of megatron-core does not count the token itself."""
    layers, window = range(config.num_hidden_layers), getattr(config, "sliding_window", None)
    there = [kind.windows == "all" and window is not None for _ in layers]
    if kind.windows == "layer_types":
        if strange := set(config.layer_types) - {"full_attention", "sliding_attention"}:
            raise _refusal("layer_types", min(strange), "'full_attention' and 'sliding_attention' can be converted.")
        there = [config.layer_types[i] == "sliding_attention" for i in layers]
    if not any(there):
        return {}
    if type(window) is not int or window < 1:
        raise _refusal("sliding_window", window, "a number of tokens, 1 or more, can be converted.")
    found: dict[str, Any] = {"window_size": (window - 1, 0)}
    return found if all(there) else {**found, "window_attn_skip_freq": [int(is_there) for is_there in there]}


def _rotary(rope: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPTModel for rotary positions."""
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refusal("rope_parameters.partial_rotary_factor", share, "1.0 can be converted.")
    found, kind = {"rotary_base": float(rope["rope_theta"])}, rope.get("rope_type", "default")
    if kind == "linear":
        return {**found, "seq_len_interpolation_factor": float(rope["factor"])}
    if kind == "llama3":
        for key, wanted in _LLAMA3.items():
            if rope[key] != wanted:
                raise _refusal(f"rope_parameters.{key}", rope[key], f"{wanted} can be converted.")
        return {**found, "rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    if kind != "default":
        raise _refusal("rope_parameters.rope_type", kind, "'default', 'linear' and 'llama3' can be converted.")
    return found


def _refusal(key: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"{key} = {shown(value)} of its config: {why}")
