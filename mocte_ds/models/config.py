"""Size and style of a decoder, and how many parameters that makes."""

from typing import Annotated, Literal

from pydantic import Field

from mocte_ds.errors import ConfigError
from mocte_ds.models.rotary import require_known_scaling
from mocte_ds.sections import LARGEST, Count, NotNegative, Plain, Positive, section
from mocte_ds.shown import shown

_Size = Annotated[int, Field(ge=1, le=1 << 24)]


@section("model")
class DecoderConfig:
    """Size and style of a decoder."""

    style: Literal["llama", "gpt2"]
    """`llama`: RMSNorm, RoPE, SwiGLU, no biases but `qkv_bias`; `gpt2`: LayerNorm, learned positions, GELU, biases,
    tied output."""
    vocab_size: Count
    """V."""
    hidden_size: _Size
    """d."""
    intermediate_size: _Size
    """Hidden units of an FFN."""
    num_layers: Annotated[int, Field(ge=1, le=100_000)]
    """Transformer layers."""
    num_heads: _Size
    """H."""
    num_kv_heads: _Size | None = None
    """K; null: as many as heads. Only the llama style has fewer."""
    head_dim: Annotated[int, Field(le=1 << 24)] | None = None
    """h, features a head; null: d / H. Only the llama style has another number."""
    qkv_bias: bool = False
    """Biases of queries, keys and values in the llama style, as in Qwen2; the gpt2 style always has them."""
    qk_norm: bool = False
    """RMSNorm of all queries of a token, and of all its keys, in the llama style, as in OLMoE."""
    head_norm: bool = False
    """RMSNorm of each head's queries and keys, in the llama style, as in Qwen3."""
    max_positions: Count = 2048
    """Longest context."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Plain] | None = None
    """Stretched rotary positions (mocte_ds/models/rotary.py): {"rope_type": "linear", "factor": F}, or Llama 3's
    {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}."""
    rotary_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's features that rotary positions turn; Glm4Moe turns half of them."""
    sliding_window: Annotated[int, Field(le=LARGEST)] | None = None
    """Tokens that each token sees, itself included, as in Mistral; null: all before it. For the llama style."""
    ffn_sizes: list[_Size] | None = None
    """Hidden units of the FFN of each layer, where layers differ; null: intermediate_size. For the llama style."""
    norm_eps: NotNegative = 1e-5
    """Added to the variance in norms."""
    tie_embeddings: bool = False
    """Output matrix = token embedding (always so in the gpt2 style)."""
    initializer_range: NotNegative = 0.02
    """Standard deviation of the weights at birth."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the layer again there: less memory, more time."""
    origin: str | None = None
    """Class of transformers that the weights came from, which the export takes where several fit: Mistral or Llama."""

    def __post_init__(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}.")
        if self.head_size < 1:
            raise ConfigError(f"head_dim = {self.head_dim} must be at least 1.")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}.")
        if self.style == "gpt2" and self.kv_heads != self.num_heads:
            raise ConfigError("num_kv_heads is for the llama style; the gpt2 style has as many as heads.")
        if self.style == "gpt2":
            self._require_plain()
        elif self.rotary_size % 2:
            raise ConfigError(
                f"head_dim (null: hidden_size / num_heads) times rotary_share = {self.rotary_size} must be even: "
                "rotary positions turn pairs."
            )
        if self.qk_norm and self.head_norm:
            raise ConfigError("qk_norm and head_norm are two places for one norm; remove one of them.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window = {self.sliding_window} must be at least 1.")
        if self.ffn_sizes is not None and len(self.ffn_sizes) != self.num_layers:
            raise ConfigError(
                f"ffn_sizes = {shown(self.ffn_sizes)} must have a size for each of the {self.num_layers} layers."
            )
        require_known_scaling(self.rope_scaling)

    def _require_plain(self) -> None:
        """Refuse what the gpt2 style does not have."""
        if self.query_size != self.hidden_size:
            raise ConfigError("head_dim is for the llama style; remove it.")
        usual = {"rotary_share": 1.0, "rope_scaling": None, "sliding_window": None, "ffn_sizes": None}
        for name, value in {"qkv_bias": False, "qk_norm": False, "head_norm": False, **usual}.items():
            if getattr(self, name) != value:
                raise ConfigError(f"{name} is for the llama style; remove it.")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """h."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """Features of a head that rotary positions turn."""
        return int(self.head_size * self.rotary_share)

    def ffn_size(self, layer: int) -> int:
        """Hidden units of a layer's FFN."""
        return self.intermediate_size if self.ffn_sizes is None else self.ffn_sizes[layer]

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
            layer = 2 * d * (self.query_size + self.kv_size) + 2 * d
            layer += (self.query_size + 2 * self.kv_size) * self.qkv_bias
            layer += (self.query_size + self.kv_size) * self.qk_norm + 2 * self.head_size * self.head_norm
            ffns = 3 * d * sum(self.ffn_size(number) for number in range(self.num_layers))
            return v * d * (1 if self.tied else 2) + self.num_layers * layer + ffns + d
        layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        return v * d + self.max_positions * d + self.num_layers * layer + 2 * d
