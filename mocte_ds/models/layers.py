"""The parts of a decoder: norms, attention with rotary positions, FFNs, and the layer made of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.models.config import DecoderConfig

# Shapes: B sequences, T tokens, d features, H heads, K key/value heads, h features a head.

# Longest context of the plain attention; see causal_attention.
_PLAIN_CONTEXT = 512


class SwiGLU(nn.Module):
    """FFN of the llama style: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GELUFFN(nn.Module):
    """FFN of the gpt2 style: c_proj(gelu(c_fc x)), the tanh form of GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm, in fp32 as in transformers' Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; rotary positions in the llama style."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        d, queries, kv, biases = config.hidden_size, config.query_size, config.kv_size, config.style == "gpt2"
        self.q_proj = nn.Linear(d, queries, bias=biases or config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=biases or config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=biases or config.qkv_bias)
        self.o_proj = nn.Linear(queries, d, bias=biases)
        self.q_norm = RMSNorm(queries, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, _ = x.shape
        projected = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (rows.view(batch, length, -1, self.head_size).transpose(1, 2) for rows in projected)
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        mixed = causal_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """Pre-norm transformer layer; `mlp` is what a block replaces."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config) if config.style == "llama" else GELUFFN(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


def make_norm(config: DecoderConfig) -> nn.Module:
    """The norm of the style, over d features."""
    if config.style == "llama":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, H, T, h) queries on (B, K, T, h) keys and values, causal.

    scaled_dot_product_attention, except for short contexts in bf16 on a CPU, where its backward pass is slow: forward
    and backward of (4, 4, 256, 32) with 2 key/value heads take 9.9 ms there and 5.3 ms as below, (2, 4, 512, 32) 16 ms
    and 11 ms (one core with avx512_bf16, torch 2.13). From T = 1024 on, and in fp32, it is the faster one.
    """
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16 or q.shape[2] > _PLAIN_CONTEXT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    batch, heads, length, size = q.shape
    pairs, group = batch * k.shape[1], heads // k.shape[1]
    # The queries of one key/value head stand below each other, so that keys need not be repeated.
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
    scores = torch.baddbmm(
        future.expand(pairs, -1, -1),
        q.reshape(pairs, group * length, size),
        k.reshape(pairs, length, size).transpose(1, 2),
        alpha=size**-0.5,
    )
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v.reshape(pairs, length, size)).view(batch, heads, length, size)


def rotary_angles(config: DecoderConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, h) of the rotary embedding (Su et al., RoFormer, 2021), halves layout as in transformers."""
    exponent = torch.arange(0, config.head_size, 2, device=like.device).float() / config.head_size
    # First the frequency, then its multiple, as in transformers: rounding the other way round shifts late positions.
    frequency = 1.0 / config.rope_theta**exponent
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
