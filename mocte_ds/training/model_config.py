"""A config of transformers from a run file or a folder; keys and values that its class does not know are refused."""

from pathlib import Path
from typing import Any

from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.shown import nearest, one_line, shown

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_OLD_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Keys that configs with `rope_parameters` take and store there."""
_MOST_LAYERS = 100_000
_OWN_CLASSES = ("mocte_blocks",)


def config_of(folder: Path) -> Any:
    """The config of a folder in Hugging Face format.

    Raises:
        ConfigError: it is none, transformers do not read it, or it is an export with experts.
    """
    from transformers import AutoConfig

    import mocte_ds.convert.hf.register  # noqa: F401
    from mocte_ds.convert.hf.load import ONLY_LOCAL, refusing

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"pretrained = {shown(str(folder))} is not a folder in Hugging Face format: it has no config.json."
        )
    try:
        with refusing(folder):
            config = AutoConfig.from_pretrained(folder, **ONLY_LOCAL)
    except CheckpointError as error:
        raise ConfigError(f"pretrained: {error}") from error
    if config.model_type in _OWN_CLASSES:
        raise ConfigError(
            f"pretrained = {shown(str(folder))} is an export with experts; start from the checkpoints of its run "
            "with model.init."
        )
    return config


def config_from(values: dict[str, Any], place: str = "hf") -> Any:
    """A config of transformers.

    Args:
        values: `model_type` and keys of its class.
        place: where they stand, for messages.

    Raises:
        ConfigError: no causal language model of transformers, a key that the class does not know (with the nearest
            one), or values that it does not take.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = values.get("model_type")
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _OWN_CLASSES]
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"{place}.model_type = {shown(kind)} is not a causal language model of transformers.{nearest(kind, known)}"
        )
    cls = CONFIG_MAPPING[kind]
    given = {key: value for key, value in values.items() if key != "model_type"}
    try:
        require_known(cls, given, place)
        try:
            config = cls(**{**dict.fromkeys(_SPECIAL), **given})
        except Exception:
            config = cls(**given)  # a class that insists on ids of its own
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    except ConfigError:
        raise
    except Exception as error:  # transformers raise many types for values that they do not take
        raise ConfigError(f"{place}: {cls.__name__} refuses it: {one_line(error)}") from error
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:
        raise ConfigError(
            f"{place}: the number of layers must lie between 1 and {_MOST_LAYERS:,}, not {shown(layers)}."
        )
    return config


def require_known(cls: Any, given: dict[str, Any], place: str) -> None:
    """Refuse keys that a config of transformers does not have, and two names of one key.

    Raises:
        ConfigError: names the key, and the nearest known one.
    """
    from transformers import PretrainedConfig

    usual, aliases = cls().to_dict(), getattr(cls, "attribute_map", None) or {}
    allowed = {*usual, *aliases, *(_OLD_ROPE if "rope_parameters" in usual else ())}
    for key in given:
        if key not in allowed:
            own = sorted(usual.keys() - PretrainedConfig().to_dict().keys())
            raise ConfigError(
                f"{place}: unknown key {shown(key)} of a {cls.__name__}.{nearest(key, sorted(allowed))} Its own keys: "
                f"{', '.join(own)}."
            )
        if aliases.get(key) in given:
            raise ConfigError(f"{place}: {key} and {aliases[key]} are two names of one key; remove one.")
