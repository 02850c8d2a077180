"""Named model sizes for run files: configs of transformers."""

from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.shown import nearest, shown

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Without dropout: a run sees its data about once."""

PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {
        **_LLAMA,
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "gpt-140m": {**_GPT2, "n_embd": 768, "n_inner": 3072, "n_layer": 14, "n_head": 12, "n_positions": 1024},
    "gpt-750m": {**_GPT2, "n_embd": 1536, "n_inner": 6144, "n_layer": 24, "n_head": 16, "n_positions": 1024},
    "mocte-1b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
}


def preset(name: str) -> dict[str, Any]:
    """`model_type` and keys of a named size, as in `model.hf` of a run file.

    quickstart          1,262,720 parameters: some minutes on two CPU cores
    gpt-140m          138,651,648 the smaller of the paper's sizes, vocabulary of GPT-2 rounded up to 50,304
    gpt-750m          758,799,360 the larger one
    mocte-1b        1,100,048,384
    llama-7b        6,738,415,616

    Args:
        name: one of the above.

    Raises:
        ConfigError: unknown name; says the nearest one.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"model.preset = {shown(name)} is unknown.{nearest(name, PRESETS)} Allowed: {', '.join(PRESETS)}."
        )
    return dict(PRESETS[name])
