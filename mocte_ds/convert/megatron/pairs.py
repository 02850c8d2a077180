"""Which tensors of a run become which tensor of megatron-core's GPTModel, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.checkpoints.names import expert_parameter
from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.experts import GATE
from mocte_ds.convert.megatron.model import Settings
from mocte_ds.models.config import DecoderConfig

# Shapes: d features, H heads, K key/value heads, h features a head, f hidden units, E experts.


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _alone(tensor: Tensor) -> tuple[Tensor]:
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
    config = source.config
    pairs = [Pair("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))]
    for i in range(config.num_layers):
        theirs, ours = f"decoder.layers.{i}", f"model.layers.{i}"
        pairs += [
            Pair(f"{theirs}.input_layernorm.weight", (f"{ours}.input_layernorm.weight",)),
            *(_attention(theirs, ours, kind, config) for kind in ("weight", "bias")[: 1 + config.qkv_bias]),
            Pair(f"{theirs}.self_attention.linear_proj.weight", (f"{ours}.self_attn.o_proj.weight",)),
            Pair(f"{theirs}.pre_mlp_layernorm.weight", (f"{ours}.post_attention_layernorm.weight",)),
        ]
        if i not in source.emerged:
            dense = f"{ours}.mlp.dense" if i in source.blocks else f"{ours}.mlp"
            pairs += _ffn(f"{theirs}.mlp", dense)
            continue
        block = source.blocks[i]
        pairs.append(_router(f"{theirs}.mlp.router.weight", block.name, settings, block.banks[0].gate.router.learn))
        for k in range(block.num_experts):
            pairs += _ffn(f"{theirs}.mlp.experts.local_experts.{k}", expert_parameter(block.name, 0, k, "")[:-1])
    pairs.append(Pair("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not config.tied:
        pairs.append(Pair("output_layer.weight", ("lm_head.weight",)))
    return pairs


def _attention(theirs: str, ours: str, kind: str, config: DecoderConfig) -> Pair:
    """(H h + 2 K h, d): the queries of each key/value head, then its key, then its value."""
    groups, size, share = config.kv_heads, config.head_size, config.num_heads // config.kv_heads

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
