"""The parts of a decoder: norms, attention with rotary positions, FFNs, and the layer made of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.cpu_attention import is_short, plain_attention
from mocte_ds.models.config import DecoderConfig
from mocte_ds.models.rotary import frequencies

# Shapes: B sequences, T tokens, d features, H heads, K key/value heads, h features a head.


class SwiGLU(nn.Module):
    """FFN of the llama style: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig, width: int | None = None) -> None:
        """Allocate ``width`` hidden units; None: config.intermediate_size."""
        super().__init__()
        width = width or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
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
        self.head_size, self.window, self.by_head = config.head_size, config.sliding_window, config.head_norm
        d, queries, kv, biases = config.hidden_size, config.query_size, config.kv_size, config.style == "gpt2"
        self.q_proj = nn.Linear(d, queries, bias=biases or config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=biases or config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=biases or config.qkv_bias)
        self.o_proj = nn.Linear(queries, d, bias=biases)
        normed = (config.head_size, config.head_size) if config.head_norm else (queries, kv)
        has_norm = config.qk_norm or config.head_norm
        self.q_norm, self.k_norm = (RMSNorm(n, config.norm_eps) if has_norm else nn.Identity() for n in normed)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, document: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.view(batch, length, -1, self.head_size) for rows in (q, k, v))
        if self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        mixed = causal_attention(q, k, v, self.window, document)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """Pre-norm transformer layer; `mlp` is what a block replaces."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config, config.ffn_size(number)) if config.style == "llama" else GELUFFN(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, document: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, document)
        return x + self.mlp(self.post_attention_layernorm(x))


def make_norm(config: DecoderConfig) -> nn.Module:
    """The norm of the style, over d features."""
    if config.style == "llama":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, document: Tensor | None = None
) -> Tensor:
    """Softmax attention of (B, H, T, h) queries on (B, K, T, h) keys and values, causal.

    With a window each query sees that many keys, its own included; with (B, T) numbers of documents only keys of its
    own document.

    scaled_dot_product_attention, except where :func:`mocte_ds.cpu_attention.plain_attention` is faster.
    """
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    window = None if window is not None and window >= length else window
    seen = None if window is None and document is None else _seen(length, window, document, q.device)
    if is_short(q):
        return plain_attention(q, k, v, seen)
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=grouped)


def _seen(length: int, window: int | None, document: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, T, T) bool: the keys that each query sees."""
    near = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        near = near.triu(1 - window)
    return near[None] if document is None else near & (document[:, :, None] == document[:, None, :])


def rotary_angles(
    config: DecoderConfig, length: int, like: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions, halves layout as in transformers; r turned features of a head.

    Args:
        config: of the decoder.
        length: T.
        like: tensor whose device and type the result has.
        positions: (B, T) of each token in its document; None: 0 to T - 1 everywhere.

    Returns:
        (T, r) each, or (B, 1, T, r) with positions.
    """
    # First the frequency, then its multiple, as in transformers: rounding the other way round shifts late positions.
    frequency = frequencies(config.rotary_size, config.rope_theta, config.rope_scaling, like.device)
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
    return (cos, sin) if positions is None else (cos[positions][:, None], sin[positions][:, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if size == x.shape[-1] else torch.cat([turned, kept], dim=-1)
