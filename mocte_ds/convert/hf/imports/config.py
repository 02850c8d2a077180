"""Which decoder a Hugging Face folder holds: its config, key by key; what our decoders do not compute is refused."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mocte_ds.claims import require_backed, require_experts, require_layers
from mocte_ds.convert.hf.folder import Folder
from mocte_ds.convert.hf.imports.keys import Foreign, Keys, llama_like, require_whole_attention
from mocte_ds.convert.hf.imports.mixtures import glm4moe, mixtral, olmoe, qwen2moe
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_object, require_small
from mocte_ds.models import DecoderConfig
from mocte_ds.ownership.checksums import Checksums
from mocte_ds.shown import one_line, shown

CONFIG_FILE = "config.json"


def read_folder(folder: Path, max_positions: int | None = None, fixed_router: bool = False) -> tuple[Foreign, Folder]:
    """Read a folder's config, and look into its files; the config is believed only as far as they bear it out.

    Args:
        folder: in Hugging Face format; only read, no code in it is run.
        max_positions: shorter context than the folder's; None: the folder's.
        fixed_router: routers of experts do not train on.

    Returns:
        The config in our terms, and the tensors.

    Raises:
        CheckpointError: no config, an architecture that is not supported, a key whose value our decoders do not compute
            or the files do not bear out, or files that are missing or damaged; names which and what to do.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: {folder} is not a model in Hugging Face format.")
    require_small(folder, CheckpointError)
    if sums := Checksums.read(folder):
        sums.require_files()
    values = read_object(path, CheckpointError, foreign=True)
    name = _architecture(values, path)
    files = Folder(folder, name)
    require_backed(values, {name: tuple(blank.shape) for name, blank in files.blanks.items()}, path)
    keys = Keys(path, _transformers_config(folder), max_positions, fixed_router)
    keys.require("quantization_config", None, "take the folder without quantisation.")
    foreign = _foreign(name, keys)
    layers = "transformer.h" if foreign.decoder.style == "gpt2" else "model.layers"
    require_layers(foreign.decoder.num_layers, files.files, layers, path)
    if foreign.mocte:
        modules = foreign.mocte["modules"]
        count = foreign.decoder.num_layers if isinstance(modules, str) else len(modules)
        require_experts(foreign.mocte["num_experts"], count, files.files, path)
    return foreign, files


def decoder_of(architecture: str, config: Any, path: Path) -> DecoderConfig:
    """The decoder of ours that computes what a dense model of transformers does.

    Args:
        architecture: name of its class.
        config: of the model.
        path: where the config stands, for messages.

    Raises:
        CheckpointError: none does; says which key stands in the way.
    """
    if architecture not in _READERS:
        raise CheckpointError(
            f"no decoder of ours has the layers of a {architecture}, so that no class but its own fits."
        )
    return _foreign(architecture, Keys(path, config, None, False)).decoder


def _foreign(architecture: str, keys: Keys) -> Foreign:
    """A config in our terms; its architecture is one of those that are read."""
    try:
        foreign = _READERS[architecture](architecture, keys)
        _require_finite(asdict(foreign.decoder))
    except (ConfigError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{keys.path} has sizes that no decoder of ours has: {one_line(error, 600)}") from error
    return foreign


def _require_finite(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _require_finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} = {shown(value)} is not a finite number.")


def _architecture(values: dict[str, Any], path: Path) -> str:
    """Name of the class that a config names first."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _READERS:
        raise CheckpointError(
            f"{path}: the architecture {str(name)[:80]} is not supported; these are: {', '.join(_READERS)}. What is "
            "exported as MocteForCausalLM comes from a checkpoint, which is the better start."
        )
    return name


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raise many types for a config that they do not know
        raise CheckpointError(f"transformers cannot read {folder / CONFIG_FILE}: {one_line(error)}") from error


def _llama(name: str, keys: Keys) -> Foreign:
    keys.require("attention_bias", False)
    keys.require("mlp_bias", False)
    return Foreign(name, llama_like(keys))


def _mistral(name: str, keys: Keys) -> Foreign:
    return Foreign(name, llama_like(keys, sliding_window=keys["sliding_window"], origin=name))


def _qwen2(name: str, keys: Keys) -> Foreign:
    if "sliding_attention" in (keys["layer_types"] or []):
        require_whole_attention(keys, keys["sliding_window"])
    return Foreign(name, llama_like(keys, qkv_bias=True))


def _qwen3(name: str, keys: Keys) -> Foreign:
    keys.require("attention_bias", False)
    if "sliding_attention" in (keys["layer_types"] or []):
        require_whole_attention(keys, keys["sliding_window"])
    return Foreign(name, llama_like(keys, head_norm=True))


def _gpt2(name: str, keys: Keys) -> Foreign:
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
        "intermediate_size": 4 * d if keys["n_inner"] is None else keys["n_inner"],
        "num_layers": keys["n_layer"],
        "num_heads": keys["n_head"],
        "max_positions": keys.max_positions,
        "norm_eps": keys["layer_norm_epsilon"],
        "initializer_range": keys["initializer_range"],
    }
    return Foreign(name, DecoderConfig("gpt2", **sizes))


_READERS: dict[str, Callable[[str, Keys], Foreign]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GPT2LMHeadModel": _gpt2,
    "MixtralForCausalLM": mixtral,
    "OlmoeForCausalLM": olmoe,
    "Qwen2MoeForCausalLM": qwen2moe,
    "Glm4MoeForCausalLM": glm4moe,
}
