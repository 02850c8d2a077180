"""Size and style of a decoder, and how many parameters that makes."""

from dataclasses import dataclass
from typing import Literal

from mocte_ds.errors import ConfigError


@dataclass(frozen=True)
class DecoderConfig:
    """Size and style of a decoder."""

    style: Literal["llama", "gpt2"]
    """`llama`: RMSNorm, RoPE, SwiGLU, no biases but `qkv_bias`; `gpt2`: LayerNorm, learned positions, GELU, biases,
    tied output."""
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
    head_dim: int | None = None
    """h, features a head; null: d / H. Only the llama style has another number."""
    qkv_bias: bool = False
    """Biases of queries, keys and values in the llama style, as in Qwen2; the gpt2 style always has them."""
    qk_norm: bool = False
    """RMSNorm of all queries of a token, and of all its keys, in the llama style, as in OLMoE."""
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
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the layer again there: less memory, more time."""

    def __post_init__(self) -> None:
        if self.style not in ("llama", "gpt2"):
            raise ConfigError(f"model.style = {self.style!r} is not one of 'llama', 'gpt2'.")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} = {getattr(self, name)} must be at least 1.")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(f"model.num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}.")
        if self.head_size < 1:
            raise ConfigError(f"model.head_dim = {self.head_dim} must be at least 1.")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ConfigError(f"model.num_kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}.")
        if self.style == "gpt2" and self.kv_heads != self.num_heads:
            raise ConfigError("model.num_kv_heads is for the llama style; the gpt2 style has as many as heads.")
        if self.style == "gpt2" and (self.query_size != self.hidden_size or self.qkv_bias or self.qk_norm):
            raise ConfigError("model.head_dim, qkv_bias and qk_norm are for the llama style; remove them.")
        if self.style == "llama" and self.head_size % 2:
            raise ConfigError(
                f"model.head_dim (null: hidden_size / num_heads) = {self.head_size} must be even: rotary positions "
                "turn pairs."
            )

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """h."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def query_size(self) -> int:
        """Features of all queries of a token together."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Features of all keys of a token together; of the values as many."""
        return self.kv_heads * self.head_size

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return self.tie_embeddings or self.style == "gpt2"

    def num_params(self) -> int:
        """Parameters of the dense model, tied ones once."""
        d, f, v = self.hidden_size, self.intermediate_size, self.vocab_size
        if self.style == "llama":
            layer = 2 * d * (self.query_size + self.kv_size) + 3 * d * f + 2 * d
            layer += (self.query_size + 2 * self.kv_size) * self.qkv_bias
            layer += (self.query_size + self.kv_size) * self.qk_norm
            return v * d * (1 if self.tied else 2) + self.num_layers * layer + d
        layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        return v * d + self.max_positions * d + self.num_layers * layer + 2 * d
