"""Models with experts as transformers' Mixtral, Qwen2Moe, OLMoE and Glm4Moe."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from mocte_ds.checkpoints.source import NARROW, Source
from mocte_ds.config import RouterConfig
from mocte_ds.convert.hf.dense import (
    Layout,
    SpecialIds,
    Stored,
    dense_ffn,
    llama_fields,
    llama_step,
    llama_stored,
    stock_class,
)
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block

# transformers' grouped matrix product wants rows of a multiple of 16 bytes; units of zeros fill them up.
UNITS = {"fp32": 4, "bf16": 8, "fp16": 8}
GATE = "{block}.banks.0.deepspeed_moe.gate."
_EXPERT = "{block}.banks.0.deepspeed_moe.experts.deepspeed_experts.{k}.{part}.weight"

# Shapes: E experts, d features, f hidden units of an expert.


def mixtral(source: Source, special: SpecialIds) -> Layout:
    """Experts in every layer; weights are divided by their sum, so that the one of top-1 is exactly 1."""
    from transformers import MixtralConfig

    blocks = source.emerged
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def ffn(layer: int) -> list[Stored]:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        gate = _gate(source, blocks[layer], f"{prefix}.gate.weight")
        return [gate, *_experts(source, blocks[layer], f"{prefix}.experts", parts)]

    fields = llama_fields(source.config, special)
    fields["intermediate_size"] = expert_width(source, blocks[0])
    config = MixtralConfig(
        **fields,
        num_local_experts=blocks[0].num_experts,
        num_experts_per_tok=_router(blocks).top_k,
        sliding_window=source.config.sliding_window,
    )
    stored, name = llama_stored(source, ffn), "MixtralForCausalLM"
    return Layout(name, stock_class(name), config, stored, "model.layers", llama_step, blocks=blocks)


def olmoe(source: Source, special: SpecialIds) -> Layout:
    """Experts in every layer, behind norms of all queries and all keys.

    Raises:
        CheckpointError: heads or biases that the class does not have.
    """
    from transformers import OlmoeConfig

    config, blocks = source.config, source.emerged
    if config.qkv_bias or config.query_size != config.hidden_size:
        raise CheckpointError(
            "OLMoE, the class for model.qk_norm, has heads of hidden_size / num_heads and no biases; export with "
            "--class own."
        )

    def ffn(layer: int) -> list[Stored]:
        prefix = f"model.layers.{layer}.mlp"
        gate = _gate(source, blocks[layer], f"{prefix}.gate.weight")
        return [gate, *_experts(source, blocks[layer], f"{prefix}.experts")]

    fields = llama_fields(config, special)
    fields["intermediate_size"] = expert_width(source, blocks[0])
    target = OlmoeConfig(
        **fields,
        num_experts=blocks[0].num_experts,
        num_experts_per_tok=_router(blocks).top_k,
        norm_topk_prob=_is_normalised(blocks),
        clip_qkv=None,
        attention_bias=False,
    )
    stored, name = llama_stored(source, ffn), "OlmoeForCausalLM"
    return Layout(name, stock_class(name), target, stored, "model.layers", llama_step, blocks=blocks)


def qwen2moe(source: Source, special: SpecialIds) -> Layout:
    """Experts in any choice of layers; norm_topk_prob divides the weights, softmax probabilities, by their sum."""
    from transformers import Qwen2MoeConfig

    config, blocks = source.config, source.emerged
    d, first = config.hidden_size, next(iter(blocks.values()))

    def ffn(layer: int) -> list[Stored]:
        if layer not in blocks:
            return dense_ffn(source, layer)
        prefix = f"model.layers.{layer}.mlp"
        # The class insists on a shared expert; one hidden unit of zeros adds exactly nothing.
        shared = {"gate_proj": (1, d), "up_proj": (1, d), "down_proj": (d, 1)}
        return [
            _gate(source, blocks[layer], f"{prefix}.gate.weight"),
            *_experts(source, blocks[layer], f"{prefix}.experts"),
            *(_zeros(f"{prefix}.shared_expert.{name}.weight", shape) for name, shape in shared.items()),
            _zeros(f"{prefix}.shared_expert_gate.weight", (1, d)),
        ]

    dense = [i for i in range(config.num_layers) if i not in blocks]
    fields = llama_fields(config, special)
    fields["intermediate_size"] = _one_size(source, dense) if dense else config.intermediate_size
    _one_size(source, blocks)
    target = Qwen2MoeConfig(
        **fields,
        moe_intermediate_size=expert_width(source, first),
        shared_expert_intermediate_size=1,
        num_experts=first.num_experts,
        num_experts_per_tok=_router(blocks).top_k,
        norm_topk_prob=_is_normalised(blocks),
        mlp_only_layers=dense,
        decoder_sparse_step=1,
        qkv_bias=config.qkv_bias,
        use_sliding_window=False,
    )
    return Layout(
        "Qwen2MoeForCausalLM",
        stock_class("Qwen2MoeForCausalLM"),
        target,
        llama_stored(source, ffn),
        "model.layers",
        llama_step,
        lambda layer: {"mlp_only_layers": [0] if layer in dense else []},
        blocks=blocks,
    )


def glm4moe(source: Source, special: SpecialIds) -> Layout:
    """Dense layers in front, then a shared FFN beside narrow experts in every layer; weights 1 or sigmoids.

    Raises:
        CheckpointError: a dense layer behind the first block, FFNs of other widths, or softmax weights.
    """
    from transformers import Glm4MoeConfig

    config, blocks = source.config, source.blocks
    first, router = min(source.emerged), _router(source.emerged)
    kept = router.weight == "sigmoid"
    if not set(blocks) >= set(range(first, config.num_layers)):
        raise CheckpointError(
            "Glm4Moe, the class for experts of the kind 'lora', has dense layers in front only; to export, let "
            f"mocte.modules name all layers from {first} on, or use expert.kind 'ffn'."
        )
    if router.weight == "softmax":
        raise CheckpointError(
            "Glm4Moe, the class for experts of the kind 'lora', weighs by a sigmoid, not by a softmax; to export, "
            "train with router.weight 'hard' or 'sigmoid'."
        )
    # A block in warm-up behind the first: its experts are born as zero and add exactly nothing.
    blocks = {i: blocks[i] for i in range(first, config.num_layers)}
    width = expert_width(source, blocks[first])
    shared = math.ceil(_one_size(source, blocks) / width)

    def ffn(layer: int) -> list[Stored]:
        if layer not in blocks:
            return dense_ffn(source, layer)
        prefix, norm = f"model.layers.{layer}.mlp", f"model.layers.{layer}.post_attention_layernorm.weight"
        gate = _gate(source, blocks[layer], f"{prefix}.gate.weight")
        correction = f"{prefix}.gate.e_score_correction_bias"

        def scaled(norm_weight: Tensor, *parts: Tensor) -> Tensor:
            rows = gate.make(*parts)
            return rows * sigmoid_scale(rows, norm_weight)

        if kept:
            ours = f"{GATE.format(block=blocks[layer].name)}cluster_correction"
            stored = [gate, Stored(correction, gate.shape[:1], (ours,), exact=gate.exact, buffer=True)]
        else:
            stored = [
                Stored(gate.name, gate.shape, (norm, *gate.sources), scaled, exact=gate.exact),
                _zeros(correction, gate.shape[:1], buffer=True),
            ]
        stored += _experts(source, blocks[layer], f"{prefix}.experts")
        for part in ("gate_proj", "up_proj", "down_proj"):
            # The class counts the shared FFN in experts; hidden units of zeros fill it up.
            name, axis = f"{prefix}.dense.{part}.weight", 1 if part == "down_proj" else 0
            shape = list(source.shapes[name])
            shape[axis] = shared * width
            make = partial(_padded, axis=axis, size=shared * width)
            stored.append(Stored(f"{prefix}.shared_experts.{part}.weight", tuple(shape), (name,), make))
        return stored

    fields = llama_fields(config, special)
    fields["rope_parameters"]["partial_rotary_factor"] = config.rotary_share
    fields["head_dim"] = config.head_size
    if first:
        fields["intermediate_size"] = _one_size(source, range(first))
    target = Glm4MoeConfig(
        **fields,
        moe_intermediate_size=width,
        n_shared_experts=shared,
        n_routed_experts=blocks[first].num_experts,
        num_experts_per_tok=router.top_k,
        first_k_dense_replace=first,
        norm_topk_prob=router.normalise or not kept,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=router.scale,
        use_qk_norm=config.head_norm,
        attention_bias=config.qkv_bias,
        num_nextn_predict_layers=0,
    )
    return Layout(
        "Glm4MoeForCausalLM",
        stock_class("Glm4MoeForCausalLM"),
        target,
        llama_stored(source, ffn),
        "model.layers",
        llama_step,
        lambda layer: {"first_k_dense_replace": 0 if layer in blocks else 1},
        blocks=blocks,
    )


def sigmoid_scale(gate: Tensor, norm_weight: Tensor) -> float:
    """Power of two that brings a gate's logits into [-1, 1], where no sigmoid is so flat that experts tie.

    Without a bias any scale leaves the choice as it is, and a power of two leaves every bit of it.

    Args:
        gate: (E, d).
        norm_weight: (d,) of the RMSNorm in front, whose output is at most sqrt(d) long before this factor.
    """
    largest = float((gate * norm_weight.detach()).norm(dim=1).max()) * gate.shape[1] ** 0.5
    return 2.0 ** -math.ceil(math.log2(largest)) if largest > 0 else 1.0


def expert_width(source: Source, block: Block) -> int:
    """Hidden units of an expert in the export."""
    units = UNITS[source.dtype]
    return math.ceil(block.banks[0].local_experts[0].gate_proj.weight.shape[0] / units) * units


def _one_size(source: Source, layers: Iterable[int]) -> int:
    """Hidden units of the FFNs of some layers.

    Raises:
        CheckpointError: they differ.
    """
    sizes = sorted({source.config.ffn_size(layer) for layer in layers})
    if len(sizes) > 1:
        raise CheckpointError(f"stock classes have FFNs of one width, the run of {sizes}; export with --class own.")
    return sizes[0]


def _router(blocks: dict[int, Block]) -> RouterConfig:
    """What the routers of all blocks have in common."""
    return next(iter(blocks.values())).banks[0].gate.router


def _is_normalised(blocks: dict[int, Block]) -> bool:
    """Whether the weights of a token's experts add up to 1."""
    return _router(blocks).weight == "hard" or _router(blocks).normalise


def _gate(source: Source, block: Block, name: str) -> Stored:
    """The whole gate, prior and residual, (E, d); in fp32, but where it came out of a model in the export's dtype."""
    prefix = GATE.format(block=block.name)
    sources = [f"{prefix}key.cluster_weight"]
    if block.banks[0].gate.router.learn:
        sources.append(f"{prefix}cluster_residual")
    rows = _total(*(source.read(path) for path in sources))
    exact = not torch.equal(rows.to(NARROW.get(source.dtype, torch.float32)).float(), rows)
    return Stored(name, (block.num_experts, block.hidden_size), tuple(sources), _total, exact=exact)


def _total(first: Tensor, *others: Tensor) -> Tensor:
    return sum(others, first)


def _experts(source: Source, block: Block, prefix: str, parts: dict[str, str] | None = None) -> list[Stored]:
    """The matrices of a layer's experts, one tensor each, filled up to :func:`expert_width`."""
    width, d = expert_width(source, block), block.hidden_size
    stored = []
    for k in range(block.num_experts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            axis, shape = (1, (d, width)) if part == "down_proj" else (0, (width, d))
            ours = _EXPERT.format(block=block.name, k=k, part=part)
            name = f"{prefix}.{k}.{parts[part] if parts else part}.weight"
            stored.append(Stored(name, shape, (ours,), partial(_padded, axis=axis, size=width)))
    return stored


def _zeros(name: str, shape: tuple[int, ...], buffer: bool = False) -> Stored:
    return Stored(name, shape, (), lambda: torch.zeros(shape), exact=buffer, buffer=buffer)


def _padded(matrix: Tensor, axis: int, size: int) -> Tensor:
    """A matrix with zeros added along an axis."""
    if matrix.shape[axis] == size:
        return matrix
    shape = list(matrix.shape)
    shape[axis] = size - matrix.shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=axis)
