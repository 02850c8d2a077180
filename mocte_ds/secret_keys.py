"""DeepSpeed configs and commands as logs, checkpoints and reports may show them: without keys, tokens and passwords."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET = ("key", "token", "password", "secret")
"""Ends of names whose values nobody else may read, e.g. Comet's `api_key`."""
_GIVEN = re.compile(
    rf"((?:^|[\s.\"'{{,-])[\w-]*(?:{'|'.join(_SECRET)})[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,}}]+)", re.I
)
LEFT_OUT = "(left out)"


def is_secret(name: str) -> bool:
    """Whether a key of a DeepSpeed config names something that stays with its user."""
    return name.lower().endswith(_SECRET)


def without_secrets(config: Any) -> Any:
    """A DeepSpeed config without the entries that only its user may read, at any depth.

    Args:
        config: without its "mocte" block, whose keys are never secret.
    """
    if isinstance(config, Mapping):
        kept = {key: value for key, value in config.items() if not is_secret(str(key))}
        return {key: without_secrets(value) for key, value in kept.items()}
    if isinstance(config, list | tuple):
        return type(config)(without_secrets(value) for value in config)
    return config


def command_shown(words: Sequence[str]) -> str:
    """A command line in one text; values of secret keys in it (`--set deepspeed.comet.api_key=...`) are left out."""
    found, hide = [], False
    for word in words:
        found.append(LEFT_OUT if hide else _GIVEN.sub(rf"\1{LEFT_OUT}", word))
        hide = word.startswith("-") and "=" not in word and is_secret(word)
    return " ".join(found)
