"""Sizes, style and routers of an exported MO-CTE model; needs transformers alone and travels with the weights."""

from typing import Any

from transformers import PretrainedConfig

KINDS = ("token", "type", "prefix", "previous", "hash", "random")
WEIGHTS = ("hard", "softmax", "sigmoid")
TABLES = ("type", "previous", "hash")
"""Kinds that look a token id up in a table."""


class MocteLMConfig(PretrainedConfig):
    """Config of a decoder whose FFNs, in some layers, are sets of experts with cluster routers."""

    model_type = "mocte"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        style: str = "llama",
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 22,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        head_norm: bool = False,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        stretched_rope: dict[str, Any] | None = None,
        rotary_share: float = 1.0,
        attention_window: int | None = None,
        ffn_sizes: list[int] | None = None,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        expert_layers: list[int] | None = None,
        num_experts: int = 4,
        expert_kind: str = "ffn",
        expert_width: int | None = None,
        routers: list[dict[str, Any]] | None = None,
        document_end_id: int | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Check and store.

        Args:
            style: `llama` (RMSNorm, rotary positions, SwiGLU) or `gpt2` (LayerNorm, learned positions, GELU, biases).
            vocab_size: V.
            hidden_size: d.
            intermediate_size: hidden units of a dense FFN.
            num_hidden_layers: layers.
            num_attention_heads: query heads.
            num_key_value_heads: key and value heads; None: as many as query heads.
            head_dim: features a head; None: hidden_size / num_attention_heads.
            qkv_bias: biases of queries, keys and values in the llama style; the gpt2 style always has them.
            qk_norm: RMSNorm of a token's queries and of its keys, in the llama style.
            head_norm: RMSNorm of each head's queries and keys, in the llama style.
            max_position_embeddings: longest context in training.
            rope_theta: base of the rotary frequencies.
            stretched_rope: rotary positions for longer contexts, rope_type "linear" or "llama3"; None: as they are.
            rotary_share: share of a head's features that rotary positions turn.
            attention_window: tokens that each token sees, itself included; None: all before it.
            ffn_sizes: hidden units of each layer's dense FFN; None: intermediate_size.
            norm_eps: added to the variance in norms.
            initializer_range: standard deviation of fresh weights.
            tie_word_embeddings: the output matrix is the token embedding.
            expert_layers: numbers of the layers with experts; the others are dense.
            num_experts: experts of one bank.
            expert_kind: `ffn` (experts instead of the FFN) or `lora` (experts beside it).
            expert_width: hidden units of one expert; None: the FFN's, shared out to the banks.
            routers: one for each bank of experts: {"kind": one of KINDS, "weight": "hard", "softmax" or "sigmoid",
                "learn": bool, "top_k": experts a token, "normalise": whether their weights are divided by their sum,
                "scale": factor of the weights, "unit_mean": whether they are divided by their mean in training}.
            document_end_id: token that ends a document; routing starts over after it.
            use_cache: whether generation keeps keys and values.
            bos_token_id: begins a text.
            eos_token_id: ends a text.
            pad_token_id: fills a batch up.
            **kwargs: fields of every transformers config.

        Raises:
            ValueError: values that no model has.
        """
        self.style, self.vocab_size, self.hidden_size = style, vocab_size, hidden_size
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        # None where the heads do not divide the features: refused below.
        whole = head_dim is None and hidden_size % num_attention_heads == 0
        self.head_dim = hidden_size // num_attention_heads if whole else head_dim
        self.qkv_bias, self.qk_norm, self.head_norm = qkv_bias, qk_norm, head_norm
        self.stretched_rope, self.rotary_share = stretched_rope, rotary_share
        self.attention_window, self.ffn_sizes = attention_window, ffn_sizes
        self.max_position_embeddings, self.rope_theta, self.norm_eps = max_position_embeddings, rope_theta, norm_eps
        self.initializer_range, self.tie_word_embeddings = initializer_range, tie_word_embeddings
        self.expert_layers = list(expert_layers or [])
        self.num_experts, self.expert_kind = num_experts, expert_kind
        usual = {"weight": "hard", "learn": False, "top_k": 1, "normalise": False, "scale": 1.0, "unit_mean": False}
        self.routers = [{**usual, **router} for router in routers or [{"kind": "token"}]]
        self.expert_width = intermediate_size // len(self.routers) if expert_width is None else expert_width
        self.document_end_id, self.use_cache = document_end_id, use_cache
        self._require_known()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def ffn_size(self, layer: int) -> int:
        """Hidden units of a layer's dense FFN."""
        return self.ffn_sizes[layer] if self.ffn_sizes else self.intermediate_size

    def _require_known(self) -> None:
        if self.style not in ("llama", "gpt2"):
            raise ValueError(f"style = {self.style!r} is not one of 'llama', 'gpt2'.")
        if self.expert_kind not in ("ffn", "lora"):
            raise ValueError(f"expert_kind = {self.expert_kind!r} is not one of 'ffn', 'lora'.")
        if not self.head_dim or self.head_dim < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size}, num_attention_heads = {self.num_attention_heads} and "
                f"num_key_value_heads = {self.num_key_value_heads} do not divide each other."
            )
        for router in self.routers:
            if router.get("kind") not in KINDS or router["weight"] not in WEIGHTS:
                raise ValueError(f"the router {router} is not one of the kinds {KINDS} with a weight of {WEIGHTS}.")
            if (router["learn"] or router["top_k"] > 1) and router["weight"] == "hard":
                raise ValueError(f"the router {router} learns or chooses several, which needs weight 'softmax'.")
            if not 1 <= router["top_k"] <= self.num_experts:
                raise ValueError(f"the router {router} cannot choose among {self.num_experts} experts.")
        if self.stretched_rope and self.stretched_rope.get("rope_type") not in ("linear", "llama3"):
            raise ValueError(f"stretched_rope = {self.stretched_rope} is of no type that this model has.")
        if self.ffn_sizes and len(self.ffn_sizes) != self.num_hidden_layers:
            raise ValueError(f"ffn_sizes = {self.ffn_sizes} must have {self.num_hidden_layers} numbers.")
        strange = [number for number in self.expert_layers if not 0 <= number < self.num_hidden_layers]
        if strange:
            raise ValueError(f"expert_layers names layer {strange[0]}; there are {self.num_hidden_layers}.")
