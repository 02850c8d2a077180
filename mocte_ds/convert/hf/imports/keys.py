"""The keys of a Hugging Face config in our terms, and how a value that no decoder of ours computes is refused."""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocte_ds.errors import CheckpointError
from mocte_ds.models import DecoderConfig


@dataclass(frozen=True)
class Foreign:
    """What a folder's config says, in our terms."""

    architecture: str
    """Name of its class in transformers."""
    decoder: DecoderConfig
    """Sizes and style."""
    mocte: dict[str, Any] | None = None
    """"mocte" block that keeps its experts and routers; None for a dense model."""


class Keys:
    """The keys of one config, with transformers' defaults."""

    def __init__(self, path: Path, config: Any, max_positions: int | None, fixed_router: bool) -> None:
        self.path, self.config, self.fixed_router = path, config, fixed_router
        most = getattr(config, "max_position_embeddings", None)
        if not isinstance(most, int) or most < 1:
            raise CheckpointError(f"{path}: max_position_embeddings = {most!r} must be 1 or more.")
        if max_positions is not None and not 1 <= max_positions <= most:
            raise CheckpointError(f"max_positions = {max_positions} must lie between 1 and the folder's {most}.")
        self.max_positions = most if max_positions is None else max_positions

    def __getitem__(self, key: str) -> Any:
        return getattr(self.config, key, None)

    def require(self, key: str, wanted: Any, advice: str = "our decoders compute something else.") -> None:
        """Refuse another value; a key that is not there has the wanted one."""
        value = getattr(self.config, key, wanted)
        if value != wanted:
            self.refuse(key, value, f"{wanted!r} is supported; {advice}")

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Raise CheckpointError for a key."""
        raise CheckpointError(f"{self.path}: {key} = {reprlib.repr(value)}: {why}")


def llama_like(keys: Keys, partial: bool = False, **more: Any) -> DecoderConfig:
    """Sizes that all Llama-like configs share.

    Args:
        keys: of the config.
        partial: whether the class turns the configured share of a head's features.
        **more: other fields of the result.

    Raises:
        CheckpointError: a value that our decoders do not compute.
    """
    keys.require("hidden_act", "silu")
    rope = {} if keys["rope_parameters"] is None else dict(keys["rope_parameters"])
    theta, share = rope.pop("rope_theta", 10000.0), rope.pop("partial_rotary_factor", 1.0)
    if (kind := rope.pop("rope_type", "default")) not in ("default", "linear", "llama3"):
        keys.refuse(
            "rope_parameters.rope_type",
            kind,
            "'default', 'linear' and 'llama3' are supported; only where the folder's own shorter context is enough, "
            "remove the key in a copy of the folder.",
        )
    if share != 1.0 and not partial:
        keys.refuse("rope_parameters.partial_rotary_factor", share, "1.0 is supported.")
    heads, d = keys["num_attention_heads"], keys["hidden_size"]
    head_dim = d // heads if keys["head_dim"] is None else keys["head_dim"]
    return DecoderConfig(
        "llama",
        keys["vocab_size"],
        d,
        keys["intermediate_size"],
        keys["num_hidden_layers"],
        heads,
        keys["num_key_value_heads"],
        None if head_dim * heads == d else head_dim,
        max_positions=keys.max_positions,
        rope_theta=float(theta),
        rope_scaling=None if kind == "default" else {"rope_type": kind, **rope},
        rotary_share=float(share),
        norm_eps=keys["rms_norm_eps"],
        tie_embeddings=bool(keys["tie_word_embeddings"]),
        initializer_range=keys["initializer_range"],
        **more,
    )


def require_whole_attention(keys: Keys, window: int | None) -> None:
    if window is not None and window < keys.max_positions:
        keys.refuse(
            "sliding_window",
            window,
            f"our attention sees all {keys.max_positions} positions; with --max-positions {window} both are the same.",
        )
