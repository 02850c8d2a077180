"""Models with experts as transformers' Mixtral, Qwen2Moe and Glm4Moe."""

import math

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.hf.dense import Layout, SpecialIds, llama_fields, llama_trunk, named
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode

# transformers' grouped matrix product wants rows of a multiple of 16 bytes, in bf16 too; units of zeros fill them up.
UNITS = 8

# Shapes: E experts, d features, f hidden units of an expert.


def mixtral(model: nn.Module, blocks: dict[int, Block], special: SpecialIds) -> Layout:
    """Experts in every layer; the weight of top-1, divided by itself, is exactly 1."""
    from transformers import MixtralConfig, MixtralForCausalLM

    weights = llama_trunk(model)
    for i, block in blocks.items():
        weights[f"model.layers.{i}.mlp.gate.weight"] = block.banks[0].gate.linear()[0]
        weights.update(_stacked(f"model.layers.{i}.mlp.experts", block))
    fields = llama_fields(model.config, special)
    fields["intermediate_size"] = expert_width(blocks[0])
    config = MixtralConfig(
        **fields,
        num_local_experts=blocks[0].num_experts,
        num_experts_per_tok=1,
        sliding_window=None,
        head_dim=model.config.head_size,
    )
    return Layout("MixtralForCausalLM", weights, lambda: MixtralForCausalLM(config), model.config.tied, blocks)


def qwen2moe(model: nn.Module, blocks: dict[int, Block], weight: str, special: SpecialIds) -> Layout:
    """Experts in any choice of layers; norm_topk_prob makes the weight 1, without it it is the softmax probability."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = model.config
    weights = llama_trunk(model)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}.mlp"
        if i not in blocks:
            weights.update(named(prefix, layer.mlp.dense if isinstance(layer.mlp, Block) else layer.mlp))
            continue
        weights[f"{prefix}.gate.weight"] = blocks[i].banks[0].gate.linear()[0]
        weights.update(_stacked(f"{prefix}.experts", blocks[i]))
        # The class insists on a shared expert; one hidden unit of zeros adds exactly nothing.
        for name, shape in (("gate_proj", (1, -1)), ("up_proj", (1, -1)), ("down_proj", (-1, 1))):
            weights[f"{prefix}.shared_expert.{name}.weight"] = torch.zeros(config.hidden_size).view(shape)
        weights[f"{prefix}.shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
    target = Qwen2MoeConfig(
        **llama_fields(config, special),
        moe_intermediate_size=expert_width(next(iter(blocks.values()))),
        shared_expert_intermediate_size=1,
        num_experts=next(iter(blocks.values())).num_experts,
        num_experts_per_tok=1,
        norm_topk_prob=weight == "hard",
        mlp_only_layers=[i for i in range(config.num_layers) if i not in blocks],
        decoder_sparse_step=1,
        qkv_bias=False,
        use_sliding_window=False,
    )
    return Layout("Qwen2MoeForCausalLM", weights, lambda: Qwen2MoeForCausalLM(target), config.tied, blocks)


def glm4moe(model: nn.Module, blocks: dict[int, Block], weight: str, special: SpecialIds) -> Layout:
    """Dense layers in front, then a shared FFN beside narrow experts in every layer; weight 1 as in Mixtral.

    Raises:
        CheckpointError: a dense layer behind the first block, or a weight other than 1.
    """
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = model.config
    first = min(i for i, block in blocks.items() if block.mode is not BlockMode.WARMUP)
    if not set(blocks) >= set(range(first, config.num_layers)):
        raise CheckpointError(
            "Glm4Moe, the class for experts of the kind 'lora', has dense layers in front only; to export, let "
            f"mocte.modules name all layers from {first} on, or use expert.kind 'ffn'."
        )
    if weight != "hard":
        raise CheckpointError(
            "Glm4Moe, the class for experts of the kind 'lora', weighs by a sigmoid, not by a softmax; to export, "
            "train with router.weight 'hard'."
        )
    # A block in warm-up behind the first: its experts are born as zero and add exactly nothing.
    blocks = {i: blocks[i] for i in range(first, config.num_layers)}
    width = expert_width(blocks[first])
    shared = math.ceil(config.intermediate_size / width)
    weights = llama_trunk(model)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}.mlp"
        if i not in blocks:
            weights.update(named(prefix, layer.mlp.dense if isinstance(layer.mlp, Block) else layer.mlp))
            continue
        block = blocks[i]
        gate = block.banks[0].gate.linear()[0]
        weights[f"{prefix}.gate.weight"] = gate * sigmoid_scale(gate, layer.post_attention_layernorm.weight)
        weights[f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(gate.shape[0])
        weights.update(_stacked(f"{prefix}.experts", block))
        for name, matrix in named(f"{prefix}.shared_experts", block.dense).items():
            # The class counts the shared FFN in experts; hidden units of zeros fill it up.
            axis = 1 if name.endswith("down_proj.weight") else 0
            weights[name] = _padded(matrix, axis, shared * width)
    fields = llama_fields(config, special)
    fields["rope_parameters"]["partial_rotary_factor"] = 1.0
    target = Glm4MoeConfig(
        **fields,
        moe_intermediate_size=width,
        n_shared_experts=shared,
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
        num_nextn_predict_layers=0,
    )
    return Layout("Glm4MoeForCausalLM", weights, lambda: Glm4MoeForCausalLM(target), config.tied, blocks)


def sigmoid_scale(gate: Tensor, norm_weight: Tensor) -> float:
    """Power of two that brings a gate's logits into [-1, 1], where no sigmoid is so flat that experts tie.

    Without a bias any scale leaves the choice as it is, and a power of two leaves every bit of it.

    Args:
        gate: (E, d).
        norm_weight: (d,) of the RMSNorm in front, whose output is at most sqrt(d) long before this factor.
    """
    largest = float((gate * norm_weight.detach()).norm(dim=1).max()) * gate.shape[1] ** 0.5
    return 2.0 ** -math.ceil(math.log2(largest)) if largest > 0 else 1.0


def _stacked(prefix: str, block: Block) -> dict[str, Tensor]:
    """The experts of a layer in one tensor for gate and up (E, 2 f, d) and one for down (E, d, f)."""
    experts, width = block.banks[0].local_experts, expert_width(block)
    gate_up = [
        torch.cat([_padded(matrix.weight.detach(), 0, width) for matrix in (expert.gate_proj, expert.up_proj)])
        for expert in experts
    ]
    down = [_padded(expert.down_proj.weight.detach(), 1, width) for expert in experts]
    return {f"{prefix}.gate_up_proj": torch.stack(gate_up), f"{prefix}.down_proj": torch.stack(down)}


def expert_width(block: Block) -> int:
    """Hidden units of an expert in the export."""
    return math.ceil(block.banks[0].local_experts[0].gate_proj.weight.shape[0] / UNITS) * UNITS


def _padded(matrix: Tensor, axis: int, size: int) -> Tensor:
    """A matrix with zeros added along an axis."""
    shape = list(matrix.shape)
    shape[axis] = size - matrix.shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=axis)
