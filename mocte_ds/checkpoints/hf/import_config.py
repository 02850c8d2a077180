"""Which decoder a Hugging Face folder holds: its config, key by key; what our decoders do not compute is refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.models import DecoderConfig

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Foreign:
    """What a folder's config says, in our terms."""

    architecture: str
    """Name of its class in transformers."""
    decoder: DecoderConfig
    """Sizes and style."""
    mocte: dict[str, Any] | None = None
    """"mocte" block that keeps its experts and routers; None for a dense model."""


def read_config(folder: Path, max_positions: int | None = None, fixed_router: bool = False) -> Foreign:
    """Read a folder's config.

    Args:
        folder: in Hugging Face format; only read, no code in it is run.
        max_positions: shorter context than the folder's; None: the folder's.
        fixed_router: routers of experts do not train on.

    Raises:
        CheckpointError: no config, an architecture that is not supported, or a key whose value our decoders do not
            compute; names the key and what to do.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = values.get("architectures") or [None]
        name = str(names[0])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} is no model in Hugging Face format.") from error
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
    if name not in _READERS:
        raise CheckpointError(
            f"{path}: the architecture {name} is not supported; these are: {', '.join(_READERS)}. What is exported as "
            "MocteForCausalLM comes from a checkpoint, which is the better start."
        )
    keys = _Keys(path, _transformers_config(folder), max_positions, fixed_router)
    keys.require("quantization_config", None, "take the folder without quantisation.")
    try:
        return _READERS[name](name, keys)
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has sizes that no decoder of ours has: {error}") from error


class _Keys:
    """The keys of a config with transformers' defaults, and how they are refused."""

    def __init__(self, path: Path, config: Any, max_positions: int | None, fixed_router: bool) -> None:
        self.path, self.config, self.fixed_router = path, config, fixed_router
        most = config.max_position_embeddings
        if max_positions is not None and not 1 <= max_positions <= most:
            raise CheckpointError(f"max_positions = {max_positions} must lie between 1 and the folder's {most}.")
        self.max_positions = max_positions or most

    def __getitem__(self, key: str) -> Any:
        return getattr(self.config, key, None)

    def require(self, key: str, wanted: Any, advice: str = "our decoders compute something else.") -> None:
        """Refuse another value; a key that is not there has the wanted one."""
        value = getattr(self.config, key, wanted)
        if value != wanted:
            self.refuse(key, value, f"{wanted!r} is supported; {advice}")

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Raise CheckpointError for a key."""
        raise CheckpointError(f"{self.path}: {key} = {value!r}: {why}")


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raise many types for a config that they do not know
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"transformers cannot read {folder / CONFIG_FILE}: {text[0]}") from error


def _llama(name: str, keys: _Keys) -> Foreign:
    keys.require("attention_bias", False)
    keys.require("mlp_bias", False)
    return Foreign(name, _llama_like(keys))


def _mistral(name: str, keys: _Keys) -> Foreign:
    _require_whole_attention(keys, keys["sliding_window"])
    return Foreign(name, _llama_like(keys))


def _qwen2(name: str, keys: _Keys) -> Foreign:
    if "sliding_attention" in (keys["layer_types"] or []):
        _require_whole_attention(keys, keys["sliding_window"])
    return Foreign(name, _llama_like(keys, qkv_bias=True))


def _gpt2(name: str, keys: _Keys) -> Foreign:
    if keys["activation_function"] not in ("gelu_new", "gelu_pytorch_tanh"):
        keys.refuse("activation_function", keys["activation_function"], "'gelu_new' is supported.")
    for key, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
        ("tie_word_embeddings", True),
    ):
        keys.require(key, wanted)
    if keys.max_positions != keys["n_positions"]:
        keys.refuse("n_positions", keys["n_positions"], "learned positions cannot be fewer; leave --max-positions out.")
    d = keys["n_embd"]
    sizes = {
        "vocab_size": keys["vocab_size"],
        "hidden_size": d,
        "intermediate_size": keys["n_inner"] or 4 * d,
        "num_layers": keys["n_layer"],
        "num_heads": keys["n_head"],
        "max_positions": keys.max_positions,
        "norm_eps": keys["layer_norm_epsilon"],
        "initializer_range": keys["initializer_range"],
    }
    return Foreign(name, DecoderConfig("gpt2", **sizes))


def _llama_like(keys: _Keys, intermediate_size: int | None = None, **more: Any) -> DecoderConfig:
    """Sizes that all Llama-like configs share."""
    keys.require("hidden_act", "silu")
    rope = keys["rope_parameters"] or {}
    if rope.get("rope_type", "default") != "default":
        keys.refuse(
            "rope_parameters.rope_type",
            rope["rope_type"],
            "scaled rotary positions are not supported; only where the folder's own shorter context is enough, remove "
            "the key in a copy of the folder.",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        keys.refuse("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "1.0 is supported.")
    heads, d = keys["num_attention_heads"], keys["hidden_size"]
    head_dim = keys["head_dim"] or d // heads
    return DecoderConfig(
        "llama",
        keys["vocab_size"],
        d,
        intermediate_size or keys["intermediate_size"],
        keys["num_hidden_layers"],
        heads,
        keys["num_key_value_heads"],
        None if head_dim * heads == d else head_dim,
        max_positions=keys.max_positions,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        norm_eps=keys["rms_norm_eps"],
        tie_embeddings=bool(keys["tie_word_embeddings"]),
        initializer_range=keys["initializer_range"],
        **more,
    )


def _require_whole_attention(keys: _Keys, window: int | None) -> None:
    if window is not None and window < keys.max_positions:
        keys.refuse(
            "sliding_window",
            window,
            f"our attention sees all {keys.max_positions} positions; with --max-positions {window} both are the same.",
        )


_READERS: dict[str, Callable[[str, _Keys], Foreign]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "GPT2LMHeadModel": _gpt2,
}
