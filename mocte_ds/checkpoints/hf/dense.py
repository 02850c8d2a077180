"""Models without experts as transformers' Llama and GPT-2, and what all exported classes have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.models import DecoderConfig
from mocte_ds.moe.block import Block


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin, end and pad a text; None where the tokenizer has none."""

    bos: int | None
    eos: int | None
    pad: int | None

    def fields(self) -> dict[str, int | None]:
        """As a transformers config names them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@dataclass(frozen=True)
class Layout:
    """A stock class, its weights, and how to make an empty one."""

    name: str
    """Name of the class."""
    weights: dict[str, Tensor]
    """All its parameters and persistent buffers by its own names."""
    make: Callable[[], nn.Module]
    """Builds the class with the right config and any weights."""
    tied: bool
    """Whether the output matrix is the token embedding."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """Blocks whose experts the class holds, by layer."""

    @property
    def routers(self) -> set[str]:
        """Names of the gates, which are stored in fp32 always: a rounded boundary sends tokens elsewhere."""
        return {name for name in self.weights if ".mlp.gate." in name}


def llama_fields(config: DecoderConfig, special: SpecialIds) -> dict[str, Any]:
    """Fields that all Llama-like configs share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **special.fields(),
    }


def llama_trunk(model: nn.Module) -> dict[str, Tensor]:
    """Everything but the FFNs; named alike in all Llama-like classes."""
    found = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    if model.config.tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def dense_ffn(ffn: nn.Module) -> nn.Module:
    """An FFN, or the dense one that a block in warm-up runs."""
    return ffn.dense if isinstance(ffn, Block) else ffn


def named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors under another path."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def llama(model: nn.Module, special: SpecialIds) -> Layout:
    """A dense model of the llama style."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = llama_trunk(model)
    for i, layer in enumerate(model.model.layers):
        weights.update(named(f"model.layers.{i}.mlp", dense_ffn(layer.mlp)))
    config = LlamaConfig(**llama_fields(model.config, special), attention_bias=False, mlp_bias=False)
    return Layout("LlamaForCausalLM", weights, lambda: LlamaForCausalLM(config), model.config.tied)


def gpt2(model: nn.Module, special: SpecialIds) -> Layout:
    """A dense model of the gpt2 style; GPT-2 joins q, k and v and stores its matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours, config = model.state_dict(), model.config
    weights = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"],
        "transformer.wpe.weight": ours["model.embed_positions.weight"],
        "lm_head.weight": ours["model.embed_tokens.weight"],
    }
    for part in ("weight", "bias"):
        weights[f"transformer.ln_f.{part}"] = ours[f"model.norm.{part}"]
        for i, layer in enumerate(model.model.layers):
            old, new = f"model.layers.{i}", f"transformer.h.{i}"
            ffn = dense_ffn(layer.mlp).state_dict()
            matrices = {
                "attn.c_attn": torch.cat([ours[f"{old}.self_attn.{name}_proj.{part}"] for name in "qkv"]),
                "attn.c_proj": ours[f"{old}.self_attn.o_proj.{part}"],
                "mlp.c_fc": ffn[f"c_fc.{part}"],
                "mlp.c_proj": ffn[f"c_proj.{part}"],
            }
            for name, matrix in matrices.items():
                weights[f"{new}.{name}.{part}"] = matrix.t().contiguous() if part == "weight" else matrix
            weights[f"{new}.ln_1.{part}"] = ours[f"{old}.input_layernorm.{part}"]
            weights[f"{new}.ln_2.{part}"] = ours[f"{old}.post_attention_layernorm.{part}"]
    target = GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.hidden_size,
        n_inner=config.intermediate_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_positions=config.max_positions,
        layer_norm_epsilon=config.norm_eps,
        initializer_range=config.initializer_range,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **special.fields(),
    )
    return Layout("GPT2LMHeadModel", weights, lambda: GPT2LMHeadModel(target), True)
