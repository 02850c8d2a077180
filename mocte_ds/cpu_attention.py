"""Faster attention for short contexts in bf16 on a CPU, for models of transformers too."""

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

NAME = "mocte_cpu"
"""Of the attention among transformers' attention functions."""
_LONGEST = 512
"""Context up to which it is the faster one; see :func:`plain_attention`."""

# Shapes: B sequences, T tokens, H heads, K key/value heads, h features per head.


def use_cpu_attention(model: Any) -> None:
    """Give a model of transformers :func:`plain_attention` where it is faster than scaled_dot_product_attention.

    Everything else that it calls (other devices, types and lengths, caches, dropout) goes to
    scaled_dot_product_attention as before. The model's config stores nothing of it.

    Args:
        model: a PreTrainedModel; unchanged if its class does not call transformers' attention functions.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if not _is_faster(module, query, key, value, attention_mask, options):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        seen = None if attention_mask is None else attention_mask[:, 0]
        mixed = plain_attention(query, key, value, seen, options.get("scaling"))
        return mixed.transpose(1, 2).contiguous(), None

    if (
        model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
        and not _asks_for_name(model)
    ):
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(NAME)


def _asks_for_name(model: Any) -> bool:
    """Whether its class does other things for another name, as sparse attention does (DeepSeek-V3.2)."""
    source = inspect.getsource(sys.modules[type(model).__module__])
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b).*\bsdpa\b", source) is not None


def _is_faster(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether :func:`plain_attention` computes this call, and in less time."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    usual = not options.get("dropout") and options.get("softcap") is None and options.get("position_bias") is None
    square = (query.shape[2], key.shape[2])
    masked = causal if mask is None else mask.dtype is torch.bool and mask.shape[1] == 1 and mask.shape[2:] == square
    return masked and usual and key.shape == value.shape and key.shape[2] == query.shape[2] and is_short(query)


def is_short(query: Tensor) -> bool:
    """Whether (B, H, T, h) queries are of the kind for which :func:`plain_attention` is faster."""
    return query.device.type == "cpu" and query.dtype is torch.bfloat16 and query.shape[2] <= _LONGEST


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention written out, for short contexts in bf16 on a CPU.

    The backward pass of scaled_dot_product_attention is slow there: forward and backward of (4, 4, 256, 32) with 2
    key/value heads take 9.9 ms there and 5.3 ms here, (2, 4, 512, 32) 16 ms and 11 ms (one core with avx512_bf16, torch
    2.13). From T = 1024 on, and in fp32, scaled_dot_product_attention is the faster one.

    Args:
        q: (B, H, T, h) queries.
        k: (B, K, T, h) keys; K divides H.
        v: (B, K, T, h) values.
        seen: (B or 1, T, T) bool: the keys that each query sees; None: all up to its own.
        scale: of the scores; None: 1 / sqrt(h).

    Returns:
        (B, H, T, h).
    """
    batch, heads, length, size = q.shape
    pairs, group = batch * k.shape[1], heads // k.shape[1]
    if seen is None:
        seen = torch.ones(1, length, length, dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, torch.finfo(q.dtype).min)
    if len(hidden) > 1:
        hidden = hidden.repeat_interleave(k.shape[1], dim=0)
    # The queries of one key/value head stand below each other, so that keys need not be repeated.
    scores = torch.baddbmm(
        hidden.repeat(1, group, 1).expand(pairs, -1, -1),
        q.reshape(pairs, group * length, size),
        k.reshape(pairs, length, size).transpose(1, 2),
        alpha=size**-0.5 if scale is None else scale,
    )
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v.reshape(pairs, length, size)).view(batch, heads, length, size)
