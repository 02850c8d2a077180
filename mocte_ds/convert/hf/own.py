"""Any model as the project's own class, whose code travels with the weights."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.dense import Layout, SpecialIds, Stored
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block
from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.moe.keys import key_class

FILES = ("configuration_mocte.py", "modeling_mocte.py", "routing_mocte.py", "tokens_mocte.py")
_ROUTER = ("kind", "weight", "learn", "top_k", "normalise", "scale", "unit_mean")
_RENAMED = (
    (re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\."), ".experts."),
    (re.compile(r"\.deepspeed_moe\.gate\.key\.cluster_"), ".router."),
    (re.compile(r"\.deepspeed_moe\.gate\.cluster_"), ".router."),
)


def own(source: Source, special: SpecialIds, reason: str | None = None) -> Layout:
    """The own class: every style, router and kind of expert, any choice of layers; one tensor for each of ours.

    Args:
        source: what is exported.
        special: ids of the tokenizer's special tokens.
        reason: why it is no stock class, for the model card.
    """
    from mocte_ds.remote_code.configuration_mocte import KINDS, MocteLMConfig

    model, emerged, settings = source.config, source.emerged, source.state["mocte"] or {}
    fields: dict[str, Any] = special.fields()
    if emerged:
        block = next(iter(emerged.values()))
        routers = [bank.gate.router for bank in block.banks]
        if strange := [router.kind for router in routers if router.kind not in KINDS]:
            raise CheckpointError(
                f"router.kind '{strange[0]}' is a key of your own, and the exported class has {', '.join(KINDS)}; "
                "load the checkpoint with mocte_ds.initialize in a script that registers it."
            )
        fields |= {
            "expert_layers": sorted(emerged),
            "num_experts": block.banks[0].num_experts,
            "expert_kind": block.kind,
            "expert_width": _width(block),
            "routers": [{name: getattr(router, name) for name in _ROUTER} for router in routers],
            "document_end_id": settings.get("eod_id"),
        }
    config = MocteLMConfig(
        style=model.style,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        head_norm=model.head_norm,
        max_position_embeddings=model.max_positions,
        rope_theta=model.rope_theta,
        stretched_rope=model.rope_scaling,
        rotary_share=model.rotary_share,
        attention_window=model.sliding_window,
        ffn_sizes=model.ffn_sizes,
        norm_eps=model.norm_eps,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tied,
        **fields,
    )
    config.auto_map = {
        "AutoConfig": "configuration_mocte.MocteLMConfig",
        "AutoModel": "modeling_mocte.MocteModel",
        "AutoModelForCausalLM": "modeling_mocte.MocteForCausalLM",
    }
    stored = [_stored(source, name, emerged) for name in source.shapes]
    return Layout(
        "MocteForCausalLM",
        _own_class,
        config,
        [entry for entry in stored if entry is not None],
        "model.layers",
        own_step,
        lambda layer: {
            "expert_layers": [0] if layer in emerged else [],
            "ffn_sizes": [model.ffn_size(layer)] if model.ffn_sizes else None,
        },
        model.vocab_size if any(key_class(router["kind"]).reads_ids for router in config.routers) else 1,
        emerged,
        FILES,
        reason,
    )


def own_step(model: nn.Module, features: Tensor, ids: Tensor) -> Tensor:
    """The first layer of the own class; learned positions are in the features already."""
    from mocte_ds.remote_code.modeling_mocte import rotary_angles, seen_keys
    from mocte_ds.remote_code.routing_mocte import read_tokens

    rotation = None
    if model.config.style == "llama":
        rotation = rotary_angles(model.config, torch.arange(features.shape[1])[None], features)
    mask = seen_keys(features, None, 0, model.config.attention_window)
    return model.model.layers[0](features, read_tokens(model.config, features, ids), rotation, mask, None)


def _own_class() -> Any:
    from mocte_ds.remote_code.modeling_mocte import MocteForCausalLM

    return MocteForCausalLM


def _stored(source: Source, name: str, emerged: dict[int, Block]) -> Stored | None:
    """A tensor of ours in the class; None for those that do not take part in the forward pass."""
    new = name
    found = re.match(r"model\.layers\.(\d+)\.mlp\.(dense|banks)\.", name)
    if found:
        layer, part = int(found[1]), found[2]
        if layer in emerged:
            if part == "dense" and emerged[layer].kind == "ffn":
                return None
        elif part == "banks":
            return None
        else:
            new = name.replace(".mlp.dense.", ".mlp.", 1)
    for pattern, text in _RENAMED:
        new = pattern.sub(text, new)
    routing = ".router." in new
    table, buffer = routing and new.endswith(".table"), routing and not new.endswith(".residual")
    return Stored(new, source.shapes[name], (name,), exact=routing, integer=table, buffer=buffer)


def _width(block: Block) -> int:
    """Hidden units of one expert."""
    shape = ffn_shape(block.banks[0].local_experts[0])
    assert shape is not None  # the FFNs of a Decoder have known forms
    return shape.width
