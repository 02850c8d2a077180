"""An exported MO-CTE model as transformers loads and runs it; needs torch and transformers alone."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_mocte import MocteLMConfig
from .routing_mocte import MocteRouter, read_tokens
from .tokens_mocte import Tokens

# Shapes: B sequences, T tokens of this call, S with those in the cache, d features, h features a head.

# What transformers calls the cache in outputs: "cache" from 5.24 on.
_CACHE = "cache" if any(f.name == "cache" for f in fields(CausalLMOutputWithPast)) else "past_key_values"


class MocteRMSNorm(nn.Module):
    """Root-mean-square norm in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MocteSwiGLU(nn.Module):
    """FFN of the llama style."""

    def __init__(self, config: MocteLMConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MocteGELU(nn.Module):
    """FFN of the gpt2 style."""

    def __init__(self, config: MocteLMConfig, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, width)
        self.c_proj = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def _ffn(config: MocteLMConfig, width: int) -> nn.Module:
    return MocteSwiGLU(config, width) if config.style == "llama" else MocteGELU(config, width)


def _norm(config: MocteLMConfig) -> nn.Module:
    if config.style == "llama":
        return MocteRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class MocteBank(nn.Module):
    """Experts of which each token uses one or a few."""

    def __init__(self, config: MocteLMConfig, router: dict[str, Any], name: str) -> None:
        super().__init__()
        self.router = MocteRouter(config, router, name)
        self.experts = nn.ModuleList([_ffn(config, config.expert_width) for _ in range(config.num_experts)])

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        index, weight = self.router(x, tokens)
        index, output = index.to(x.device), torch.zeros_like(x)
        for k in index.unique().tolist():
            places = index == k
            chosen = places.any(dim=-1)
            added = self.experts[k](x[chosen])
            if weight is not None:
                added = (added * (weight.to(x.device) * places).sum(dim=-1)[chosen][..., None]).to(added.dtype)
            output[chosen] = output[chosen] + added
        return output


class MocteExperts(nn.Module):
    """What stands for a layer's FFN: the sum of its banks, beside the dense FFN for the kind `lora`."""

    def __init__(self, config: MocteLMConfig, layer: int) -> None:
        super().__init__()
        if config.expert_kind == "lora":
            self.dense = _ffn(config, config.ffn_size(layer))
        self.has_dense = config.expert_kind == "lora"
        self.banks = nn.ModuleList([MocteBank(config, r, f"{layer}.{b}") for b, r in enumerate(config.routers)])

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        output = self.dense(x) if self.has_dense else None
        for bank in self.banks:
            added = bank(x, tokens)
            output = added if output is None else output + added
        return output


class MocteAttention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: MocteLMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.by_head = layer, config.head_dim, config.head_norm
        d, kv, biases = config.hidden_size, config.num_key_value_heads * config.head_dim, config.style == "gpt2"
        queries = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(d, queries, bias=biases or config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=biases or config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=biases or config.qkv_bias)
        self.o_proj = nn.Linear(queries, d, bias=biases)
        normed = (config.head_dim, config.head_dim) if config.head_norm else (queries, kv)
        has_norm = config.qk_norm or config.head_norm
        self.q_norm, self.k_norm = (MocteRMSNorm(n, config.norm_eps) if has_norm else nn.Identity() for n in normed)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Any) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.view(batch, length, -1, self.head_dim) for rows in (q, k, v))
        if self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MocteLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: MocteLMConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MocteAttention(config, layer)
        self.has_experts = layer in config.expert_layers
        self.mlp = MocteExperts(config, layer) if self.has_experts else _ffn(config, config.ffn_size(layer))
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)

    def forward(
        self, x: Tensor, tokens: Tokens, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Any
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        hidden = self.post_attention_layernorm(x)
        return x + (self.mlp(hidden, tokens) if self.has_experts else self.mlp(hidden))


class MoctePreTrainedModel(PreTrainedModel):
    """Loading, saving and fresh weights."""

    config_class = MocteLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["MocteLayer"]  # noqa: RUF012  transformers want lists, and pass over tuples
    _supports_sdpa = True
    # Not tables, whose integers would become floats.
    _keep_in_fp32_modules_strict = [f"router.{name}" for name in "weight bias correction mean residual".split()]  # noqa: RUF012  # noqa: RUF012


class MocteModel(MoctePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MocteLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.style == "gpt2":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([MocteLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = _norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Any = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, d); arguments as in every model of transformers (``cache`` is ``past_key_values``).

        Routing starts over at each new document: after ``document_end_id``, where position_ids begin at 0 again, and
        as transformers' `cu_seq_lens_q` or `seq_idx` say. Attention does not read these.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a mask of other than two dimensions, a static
                cache, too long a sequence for learned positions, or something a router needs is missing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given.")
        cache = past_key_values if cache is None else cache
        if getattr(cache, "is_compileable", False):
            raise ValueError("static caches are not supported; use cache_implementation 'dynamic'.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (batch, length).")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        positions = _positions(x, attention_mask, past) if position_ids is None else position_ids.to(x.device)
        rotation = None
        if self.config.style == "gpt2":
            if past + x.shape[1] > self.config.max_position_embeddings:
                raise ValueError(
                    f"{past + x.shape[1]} tokens are more than max_position_embeddings = "
                    f"{self.config.max_position_embeddings}."
                )
            x = x + self.embed_positions(positions)
        else:
            rotation = rotary_angles(self.config, positions, x)
        mask = seen_keys(x, attention_mask, past, self.config.attention_window)
        given = {**packing, "attention_mask": attention_mask, "position_ids": position_ids}
        tokens = read_tokens(self.config, x, input_ids, given, cache)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x]
        for layer in self.layers:
            x = layer(x, tokens, rotation, mask, cache)
            if wanted:
                states.append(x)
        tokens.leave(cache)
        x = self.norm(x)
        hidden_states = (*states[:-1], x) if wanted else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **{_CACHE: cache})


class MocteForCausalLM(MoctePreTrainedModel, GenerationMixin):
    """Predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  as transformers has it

    def __init__(self, config: MocteLMConfig) -> None:
        super().__init__(config)
        self.model = MocteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, V), with ``labels`` (B, T), -100 for none, also the mean loss; see :class:`MocteModel`."""
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{_CACHE: getattr(output, _CACHE)}
        )
        return found.to_tuple() if return_dict is False else found


def _positions(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """(B or 1, T) place of each token in its sequence; padding does not count."""
    length = x.shape[1]
    if attention_mask is None:
        return torch.arange(past, past + length, device=x.device)[None]
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:].to(x.device)


def seen_keys(x: Tensor, attention_mask: Tensor | None, past: int, window: int | None) -> Tensor | None:
    """(B, 1, T, S) which keys each query sees; None: all before it, which the attention then knows by itself."""
    length = x.shape[1]
    padded = attention_mask is not None and not bool(attention_mask.all())
    near = window is not None and past + length > window
    if not padded and not near and (past == 0 or length == 1):
        return None
    query, key = (torch.arange(start, past + length, device=x.device) for start in (past, 0))
    seen = (key <= query[:, None])[None, None]
    if near:
        seen = seen & (key > query[:, None] - window)
    if padded:
        # A padded query sees itself, so that no row of the softmax is empty.
        seen = seen & attention_mask[:, None, None, :].to(x.device).bool() | (key == query[:, None])
    return seen


def rotary_angles(config: MocteLMConfig, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, 1, T, turned features of a head), halves layout."""
    size = int(config.head_dim * config.rotary_share)
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, device=like.device).float() / size)
    if config.stretched_rope:
        frequency = _stretched(frequency, config.stretched_rope)
    angle = positions[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _stretched(frequency: Tensor, rope: dict[str, Any]) -> Tensor:
    """Frequencies (h / 2,) for a longer context: all of them slower, or those with long waves (Llama 3.1)."""
    slow = frequency / rope["factor"]
    if rope["rope_type"] == "linear":
        return slow
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    length = 2 * math.pi / frequency
    share = (context / length - low) / (high - low)
    mixed = torch.where(length > context / low, slow, (1 - share) * slow + share * frequency)
    return torch.where(length < context / high, frequency, mixed)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)
