"""Small models of transformers for tests, drawn as a run draws them, and their loss per token."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

FFNS = {"llama": "model.layers.*.mlp", "gpt2": "transformer.h.*.mlp", "phi": "model.layers.*.mlp"}
"""Where each style has its FFNs: gated ones, plain ones of Conv1D (stored transposed), plain ones of nn.Linear."""
OUTPUTS = {"llama": "down_proj", "gpt2": "c_proj", "phi": "fc2"}
"""The matrix that writes an FFN's output."""
_RESIDUAL = ("o_proj.weight", "down_proj.weight", "dense.weight", "fc2.weight")
_NONE = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_OF_STYLE = {
    "llama": {"rms_norm_eps": 1e-5},
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def small_model(
    style: str,
    vocab_size: int,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    layers: int = 2,
    heads: int = 2,
    positions: int = 64,
    **config: Any,
) -> Any:
    """A causal language model in fp32 and in training mode, without dropout, its weights from torch's generator.

    Residual outputs are drawn times 1/sqrt(2 layers), as in GPT-2 (Radford et al., 2019).

    Args:
        style: a `model_type` of transformers.
        vocab_size: V.
        hidden_size: d.
        intermediate_size: hidden units of an FFN.
        layers: how many.
        heads: of attention.
        positions: longest context.
        **config: other keys of the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"n_inner" if style == "gpt2" else "intermediate_size": intermediate_size}
    sizes |= {"vocab_size": vocab_size, "max_position_embeddings": positions, "use_cache": False}
    made = AutoConfig.for_model(style, **{**sizes, **_NONE, **_OF_STYLE.get(style, {}), **config})
    model = AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        if style != "gpt2" and name.endswith(_RESIDUAL):  # transformers draw GPT-2's so
            nn.init.normal_(parameter, std=made.initializer_range * (2 * layers) ** -0.5)
    return model


def small_llama(*sizes: int, **more: Any) -> Any:
    """A Llama; arguments as of :func:`small_model`."""
    return small_model("llama", *sizes, **more)


def loss_of(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token.

    Args:
        model: or the engine around it.
        input_ids: (B, T).
        labels: (B, T), the token after each position, -100 where there is none.
    """
    logits = model(input_ids=input_ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
