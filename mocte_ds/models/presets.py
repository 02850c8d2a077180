"""Named model sizes for run files."""

from dataclasses import replace
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.models.config import DecoderConfig
from mocte_ds.shown import nearest, shown

PRESETS: dict[str, DecoderConfig] = {
    "quickstart": DecoderConfig("llama", 2048, 128, 352, 4, 4, 2, max_positions=256),
    "gpt-140m": DecoderConfig("gpt2", 50304, 768, 3072, 14, 12, max_positions=1024),
    "gpt-750m": DecoderConfig("gpt2", 50304, 1536, 6144, 24, 16, max_positions=1024),
    "llama-1b": DecoderConfig("llama", 32000, 2048, 5632, 22, 32, 4, max_positions=2048),
    "llama-7b": DecoderConfig("llama", 32000, 4096, 11008, 32, 32, max_positions=4096),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """A named size, with some fields changed.

    quickstart          1,262,720 parameters: some minutes on two CPU cores
    gpt-140m          138,651,648 the smaller of the paper's sizes, vocabulary of GPT-2 rounded up to 50,304
    gpt-750m          758,799,360 the larger one
    llama-1b        1,100,048,384
    llama-7b        6,738,415,616

    Args:
        name: one of the above.
        **changes: fields of DecoderConfig to replace.

    Raises:
        ConfigError: unknown name; says the nearest one.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"model.preset = {shown(name)} is unknown.{nearest(name, PRESETS)} Allowed: {', '.join(PRESETS)}."
        )
    return replace(PRESETS[name], **changes)
