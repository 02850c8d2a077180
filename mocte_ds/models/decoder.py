"""The decoders that launch/pretrain.py trains: Llama-style and GPT-2-style, with the numbers of transformers' classes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.errors import ConfigError

# Shapes: B sequences, T tokens, d features, H heads, K key/value heads, h features a head, V vocabulary.


@dataclass(frozen=True)
class DecoderConfig:
    """Size and style of a decoder."""

    style: Literal["llama", "gpt2"]
    """`llama`: RMSNorm, RoPE, SwiGLU, no biases; `gpt2`: LayerNorm, learned positions, GELU, biases, tied embeddings."""
    vocab_size: int
    """V."""
    hidden_size: int
    """d."""
    intermediate_size: int
    """Hidden units of an FFN."""
    num_layers: int
    """Transformer layers."""
    num_heads: int
    """H."""
    num_kv_heads: int | None = None
    """K; null: as many as heads. Only the llama style has fewer."""
    max_positions: int = 2048
    """Longest context."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    tie_embeddings: bool = False
    """Output matrix = token embedding (always so in the gpt2 style)."""
    initializer_range: float = 0.02
    """Standard deviation of the weights at birth."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"model.num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}.")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"model.num_kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}.")
        if self.style == "gpt2" and self.kv_heads != self.num_heads:
            raise ConfigError("model.num_kv_heads is for the llama style; the gpt2 style has as many as heads.")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """h."""
        return self.hidden_size // self.num_heads

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return self.tie_embeddings or self.style == "gpt2"

    def num_params(self) -> int:
        """Parameters of the dense model, tied ones once."""
        d, f, v = self.hidden_size, self.intermediate_size, self.vocab_size
        kv = self.kv_heads * self.head_size
        if self.style == "llama":
            layer = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
            return v * d * (1 if self.tied else 2) + self.num_layers * layer + d
        layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        return v * d + self.max_positions * d + self.num_layers * layer + 2 * d


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
        self.config = config
        d, kv, bias = config.hidden_size, config.kv_heads * config.head_size, config.style == "gpt2"
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, kv, bias=bias)
        self.v_proj = nn.Linear(d, kv, bias=bias)
        self.o_proj = nn.Linear(d, d, bias=bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.config.head_size).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
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
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.style == "gpt2":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, rotation = self.embed_tokens(input_ids), None
        if self.config.style == "gpt2":
            x = x + self.embed_positions.weight[: input_ids.shape[1]]
        else:
            rotation = _rotation(self.config, input_ids.shape[1], x)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.norm(x)


class Decoder(nn.Module):
    """A decoder-only language model; the llama style's parameters are named as in transformers' LlamaForCausalLM."""

    def __init__(self, config: DecoderConfig) -> None:
        """Random weights: normal with ``initializer_range``, residual outputs scaled by 1/sqrt(2 layers), zero biases."""
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
                scale = (2 * config.num_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(parameter, std=config.initializer_range * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the next token.

        Args:
            input_ids: (B, T) int64, T at most max_positions.
            labels: (B, T) the token after each position, -100 where there is none.

        Returns:
            Mean loss in nats a token (scalar) with labels, else logits (B, T, V).
        """
        if input_ids.shape[1] > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {input_ids.shape[1]} tokens is longer than model.max_positions = "
                f"{self.config.max_positions}."
            )
        weight = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        logits = F.linear(self.model(input_ids), weight)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, H, T, h) queries on (B, K, T, h) keys and values, causal.

    On a CPU the backward pass of scaled_dot_product_attention takes longer than the whole of a plain softmax at short
    contexts (a step at d=128, T=256 in bf16: 0.46 s against 0.25 s), so short ones are computed plainly there.
    """
    if q.device.type != "cpu" or q.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _norm(config: DecoderConfig) -> nn.Module:
    if config.style == "llama":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def _rotation(config: DecoderConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, h) of the rotary embedding (Su et al., RoFormer, 2021), halves layout as in transformers."""
    exponent = torch.arange(0, config.head_size, 2, device=like.device).float() / config.head_size
    angle = torch.arange(length, device=like.device).float()[:, None] / config.rope_theta ** exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
