"""Which tensors of a trained model become which tensor of megatron-core's GPTModel, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.checkpoints.names import expert_parameter
from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.megatron.settings import FFN, GATE, Settings, blocks_by_layer
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import BlockMode

# Shapes: d features, H heads, K key/value heads, h features a head, f hidden units, E experts.


def _same(tensor: Tensor, *_aliases: Tensor) -> Tensor:
    return tensor


def _alone(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True)
class Pair:
    """One tensor there and what it is made of here."""

    name: str
    """In the state dict of GPTModel with all experts in one process."""
    sources: tuple[str, ...]
    """Ours."""
    join: Callable[..., Tensor] = _same
    """Ours to theirs."""
    split: Callable[[Tensor], tuple[Tensor, ...]] = _alone
    """Theirs to ours."""
    router: bool = False
    """Kept in fp32: a rounded boundary sends tokens elsewhere."""

    def tensor(self, source: Source) -> Tensor:
        """Theirs, in fp32."""
        return self.join(*(source.read(name) for name in self.sources))

    def dtype(self, source: Source) -> torch.dtype:
        """In which it is stored."""
        return torch.bfloat16 if source.dtype == "bf16" and not self.router else torch.float32


def all_pairs(source: Source, settings: Settings) -> list[Pair]:
    """Every tensor of the GPTModel, in the order of the layers."""
    sizes, blocks = settings.transformer_config, blocks_by_layer(source)
    tied = settings.gpt_model["share_embeddings_and_output_weights"]
    embedding, head = "embedding.word_embeddings.weight", "lm_head.weight"
    if tied:
        pairs = [Pair(embedding, ("model.embed_tokens.weight", head), split=lambda weight: (weight, weight))]
    else:
        pairs = [Pair(embedding, ("model.embed_tokens.weight",))]
    for i in range(sizes["num_layers"]):
        theirs, ours, ffn = f"decoder.layers.{i}", f"model.layers.{i}", FFN.format(layer=i)
        names = {
            "input_layernorm": "input_layernorm",
            "self_attention.linear_proj": "self_attn.o_proj",
            "pre_mlp_layernorm": "post_attention_layernorm",
        }
        if sizes.get("qk_layernorm"):
            names |= {
                "self_attention.q_layernorm": "self_attn.q_norm",
                "self_attention.k_layernorm": "self_attn.k_norm",
            }
        pairs += [Pair(f"{theirs}.{there}.weight", (f"{ours}.{here}.weight",)) for there, here in names.items()]
        kinds = ("weight", "bias") if sizes["add_qkv_bias"] else ("weight",)
        pairs += [_attention(theirs, ours, kind, settings) for kind in kinds]
        block = blocks.get(i)
        if block is None or block.mode is BlockMode.WARMUP:
            pairs += _ffn(f"{theirs}.mlp", f"{ffn}.dense" if block else ffn)
            continue
        pairs.append(_router(f"{theirs}.mlp.router.weight", block.name, settings, block.banks[0].gate.router.learn))
        for k in range(block.num_experts):
            pairs += _ffn(f"{theirs}.mlp.experts.local_experts.{k}", expert_parameter(block.name, 0, k, "")[:-1])
    pairs.append(Pair("decoder.final_layernorm.weight", ("model.norm.weight",)))
    return pairs if tied else [*pairs, Pair("output_layer.weight", (head,))]


def unused(source: Source, pairs: list[Pair]) -> list[str]:
    """Names of ours that take no part in what the model computes: gates before emergence, equal biases.

    Raises:
        CheckpointError: another tensor has no place in GPTModel, or one that it has is missing.
    """
    idle: tuple[str, ...] = ()
    for block in blocks_by_layer(source).values():
        warm = block.mode is BlockMode.WARMUP
        idle += (f"{block.name}.banks." if warm else GATE.format(block=block.name),)
    used = {name for pair in pairs for name in pair.sources}
    if missing := used - source.shapes.keys():
        raise CheckpointError(f"megatron-core's GPTModel needs {min(missing)}, which the model does not have.")
    rest = [name for name in source.shapes if name not in used]
    if lost := [name for name in rest if not name.startswith(idle)]:
        raise CheckpointError(f"megatron-core's GPTModel has no place for {lost[0]} ({len(lost)} such tensors).")
    return rest


def _attention(theirs: str, ours: str, kind: str, settings: Settings) -> Pair:
    """(H h + 2 K h, d): the queries of each key/value head, then its key, then its value."""
    sizes = settings.transformer_config
    groups, size = sizes["num_query_groups"], sizes["kv_channels"]
    share = sizes["num_attention_heads"] // groups

    def join(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        parts = qkv.unflatten(0, (groups, -1)).split([share * size, size, size], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    sources = tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
    return Pair(f"{theirs}.self_attention.linear_qkv.{kind}", sources, join, split)


def _ffn(theirs: str, ours: str) -> list[Pair]:
    """(2 f, d): the gate's rows above those of what it multiplies; and (d, f)."""
    return [
        Pair(
            f"{theirs}.linear_fc1.weight",
            (f"{ours}.gate_proj.weight", f"{ours}.up_proj.weight"),
            lambda gate, up: torch.cat([gate, up]),
            lambda fc1: fc1.chunk(2),
        ),
        Pair(f"{theirs}.linear_fc2.weight", (f"{ours}.down_proj.weight",)),
    ]


def _router(name: str, block: str, settings: Settings, learn: bool) -> Pair:
    """(E, d); on the way back all that a router has learned is in its prior, and the residual is zero."""
    gate, scale = GATE.format(block=block), settings.router_scale
    if not learn:
        return Pair(name, (f"{gate}key.cluster_weight",), lambda w: w * scale, lambda w: (w / scale,), router=True)
    return Pair(
        name,
        (f"{gate}key.cluster_weight", f"{gate}cluster_residual"),
        lambda prior, residual: (prior + residual) * scale,
        lambda w: (w / scale, torch.zeros_like(w)),
        router=True,
    )
