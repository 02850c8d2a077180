"""Which stock transformers class a trained model is, exactly, and how its tensors are named there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.errors import CheckpointError
from mocte_ds.models import DecoderConfig
from mocte_ds.moe.block import Block, BlockMode


@dataclass(frozen=True)
class Layout:
    """A stock class, its weights, and how to make an empty one."""

    name: str
    weights: dict[str, Tensor]
    make: Callable[[], nn.Module]
    tied: bool


def choose_layout(model: nn.Module, state: dict[str, Any]) -> Layout:
    """The stock class that computes what the model computes.

    Args:
        model: a Decoder with its blocks, all experts local.
        state: as load_model returns it.

    Raises:
        CheckpointError: there is none; says which setting stands in the way and what to use instead.
    """
    config: DecoderConfig = model.config
    blocks = {i: layer.mlp for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, Block)}
    mocte = state.get("mocte")
    if not blocks or all(block.mode is BlockMode.WARMUP for block in blocks.values()):
        return _gpt2(model, blocks) if config.style == "gpt2" else _llama(model, blocks)
    if config.style != "llama":
        raise CheckpointError("no stock class has experts in the GPT-2 style; export a run of the llama style.")
    router = mocte["router"]
    if router["kind"] != "token":
        raise CheckpointError(
            f"no stock class routes by a table (router.kind '{router['kind']}'); train with router.kind 'token' and "
            "router.bias false to export."
        )
    for block in blocks.values():
        if block.banks[0].gate.cluster_bias.any():
            raise CheckpointError(
                "stock gates have no bias, this run's have one; train with router.bias false to export."
            )
    if mocte["expert"]["kind"] == "lora":
        return _glm4moe(model, blocks, router)
    if router["weight"] == "hard" and len(blocks) == config.num_layers:
        return _mixtral(model, blocks)
    return _qwen2moe(model, blocks, router)


def _common(config: DecoderConfig) -> dict[str, Any]:
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
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def _trunk(model: nn.Module) -> dict[str, Tensor]:
    """Everything but the FFNs; named alike in all Llama-like classes."""
    found = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    if model.config.tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def _ffn(prefix: str, ffn: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in ffn.state_dict().items()}


def _dense(block: nn.Module) -> nn.Module:
    return block.dense if isinstance(block, Block) else block


def _stacked(prefix: str, experts: list[nn.Module]) -> dict[str, Tensor]:
    """transformers keeps the experts of a layer in one tensor for gate and up, and one for down."""
    gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts]
    return {
        f"{prefix}.gate_up_proj": torch.stack(gate_up).detach(),
        f"{prefix}.down_proj": torch.stack([expert.down_proj.weight for expert in experts]).detach(),
    }


def _members(block: Block) -> list[nn.Module]:
    """Experts of a block; one still in warm-up is a mixture of equal experts."""
    experts = list(block.banks[0].local_experts)
    if block.mode is BlockMode.WARMUP and block.kind == "ffn":
        return [block.dense for _ in experts]
    return experts


def _llama(model: nn.Module, blocks: dict[int, Block]) -> Layout:
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = _trunk(model)
    for i, layer in enumerate(model.model.layers):
        weights.update(_ffn(f"model.layers.{i}.mlp", _dense(layer.mlp)))
    config = LlamaConfig(**_common(model.config))
    return Layout("LlamaForCausalLM", weights, lambda: LlamaForCausalLM(config), model.config.tied)


def _mixtral(model: nn.Module, blocks: dict[int, Block]) -> Layout:
    """Top-1 with the weight divided by itself: exactly 1."""
    from transformers import MixtralConfig, MixtralForCausalLM

    weights = _trunk(model)
    for i, block in blocks.items():
        weights[f"model.layers.{i}.mlp.gate.weight"] = block.banks[0].gate.cluster_weight
        weights.update(_stacked(f"model.layers.{i}.mlp.experts", _members(block)))
    config = MixtralConfig(
        **_common(model.config),
        num_local_experts=blocks[0].num_experts,
        num_experts_per_tok=1,
        sliding_window=None,
        head_dim=model.config.head_size,
    )
    return Layout("MixtralForCausalLM", weights, lambda: MixtralForCausalLM(config), model.config.tied)


def _qwen2moe(model: nn.Module, blocks: dict[int, Block], router: dict[str, Any]) -> Layout:
    """Any choice of layers; norm_topk_prob divides the one weight by itself, so it stands for the hard weight."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = model.config
    weights = _trunk(model)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}.mlp"
        if i not in blocks:
            weights.update(_ffn(prefix, layer.mlp))
            continue
        gate = blocks[i].banks[0].gate.cluster_weight
        if blocks[i].mode is BlockMode.WARMUP and router["weight"] == "softmax":
            raise CheckpointError(
                f"{blocks[i].name} is still in warm-up; with router.weight 'softmax' its output has no weight to export. "
                "Train until it emerges."
            )
        weights[f"{prefix}.gate.weight"] = gate
        weights.update(_stacked(f"{prefix}.experts", _members(blocks[i])))
        # The class insists on a shared expert; one hidden unit of zeros adds exactly nothing.
        for name, shape in (("gate_proj", (1, -1)), ("up_proj", (1, -1)), ("down_proj", (-1, 1))):
            weights[f"{prefix}.shared_expert.{name}.weight"] = torch.zeros(config.hidden_size).view(shape)
        weights[f"{prefix}.shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
    target = Qwen2MoeConfig(
        **_common(config),
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=1,
        num_experts=next(iter(blocks.values())).num_experts,
        num_experts_per_tok=1,
        norm_topk_prob=router["weight"] == "hard",
        mlp_only_layers=[i for i in range(config.num_layers) if i not in blocks],
        decoder_sparse_step=1,
        qkv_bias=False,
        use_sliding_window=False,
    )
    return Layout("Qwen2MoeForCausalLM", weights, lambda: Qwen2MoeForCausalLM(target), config.tied)


def _glm4moe(model: nn.Module, blocks: dict[int, Block], router: dict[str, Any]) -> Layout:
    """Dense front layers, then a shared FFN beside narrow experts; sigmoid gate, weight divided by itself."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config, first = model.config, min(blocks)
    if sorted(blocks) != list(range(first, config.num_layers)):
        raise CheckpointError(
            "Glm4Moe has dense layers in front only; let mocte.modules name all layers behind the first."
        )
    if router["weight"] != "hard":
        raise CheckpointError(
            "Glm4Moe's weight is a sigmoid, not a softmax; train with router.weight 'hard' to export."
        )
    width = _members(blocks[first])[0].gate_proj.weight.shape[0]
    if config.intermediate_size % width:
        raise CheckpointError(
            f"Glm4Moe's shared FFN is a multiple of an expert's width; {config.intermediate_size} is none of {width}."
        )
    weights = _trunk(model)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}.mlp"
        if i not in blocks:
            weights.update(_ffn(prefix, layer.mlp))
            continue
        gate = blocks[i].banks[0].gate.cluster_weight
        # The sigmoid must not saturate, or experts tie; without a bias any scale leaves the choice as it is.
        weights[f"{prefix}.gate.weight"] = gate / gate.norm(dim=1).max().clamp(min=1e-30) / config.hidden_size**0.5
        weights[f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(gate.shape[0])
        weights.update(_stacked(f"{prefix}.experts", _members(blocks[i])))
        weights.update(_ffn(f"{prefix}.shared_experts", blocks[i].dense))
    common = _common(config)
    common["rope_parameters"]["partial_rotary_factor"] = 1.0
    target = Glm4MoeConfig(
        **common,
        moe_intermediate_size=width,
        n_shared_experts=config.intermediate_size // width,
        n_routed_experts=blocks[first].num_experts,
        num_experts_per_tok=1,
        first_k_dense_replace=first,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        head_dim=config.head_size,
        use_qk_norm=False,
        attention_bias=False,
    )
    return Layout("Glm4MoeForCausalLM", weights, lambda: Glm4MoeForCausalLM(target), config.tied)


def _gpt2(model: nn.Module, blocks: dict[int, Block]) -> Layout:
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
        ffn = _dense(layer.mlp).state_dict()
        for part in ("weight", "bias"):
            turn = (lambda t: t.mT.contiguous()) if part == "weight" else (lambda t: t)  # Conv1D is stored transposed
            qkv = torch.cat([ours[f"{old}.self_attn.{name}_proj.{part}"] for name in "qkv"])
            weights[f"{new}.attn.c_attn.{part}"] = turn(qkv)
            weights[f"{new}.attn.c_proj.{part}"] = turn(ours[f"{old}.self_attn.o_proj.{part}"])
            weights[f"{new}.mlp.c_fc.{part}"] = turn(ffn[f"c_fc.{part}"])
            weights[f"{new}.mlp.c_proj.{part}"] = turn(ffn[f"c_proj.{part}"])
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
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return Layout("GPT2LMHeadModel", weights, lambda: GPT2LMHeadModel(target), True)
