"""The Llama that benchmarks train, of transformers, and its loss."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.training.model import TransformersModel


def llama(vocab: int, d: int, width: int, layers: int, context: int) -> TransformersModel:
    """Its config: heads of 64 features, as many for keys and values.

    Raises:
        ConfigError: transformers have no such model.
    """
    sizes = {"vocab_size": vocab, "hidden_size": d, "intermediate_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": max(1, d // 64), "max_position_embeddings": context, "use_cache": False}
    return TransformersModel(hf={"model_type": "llama", **sizes, **heads})


def llama_ffn(model: TransformersModel) -> nn.Module:
    """One FFN of it."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(model.config)


def next_token_loss(engine: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of (B, T + 1) token ids."""
    logits = engine(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
