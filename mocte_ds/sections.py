"""Turns sections of JSON and YAML into dataclasses; an unknown key or a wrong type is refused with what is allowed."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from mocte_ds.errors import ConfigError

Section = TypeVar("Section")


def parse_section(cls: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Build a dataclass from a mapping; nested dataclasses from nested mappings.

    Args:
        cls: dataclass with type hints built from int, float, bool, str, Literal, list, dict and dataclasses.
        values: keys and values as read from JSON or YAML.
        where: path of the section, for messages, e.g. "mocte.router".

    Raises:
        ConfigError: unknown key (with the nearest valid one) or a value of the wrong type (with what is allowed).
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a section with keys, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"unknown key {where}.{key} (value {values[key]!r}).{hint} Allowed: {', '.join(sorted(hints))}."
            )
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for, or ConfigError."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_section(hint, {} if value is None else value, where)  # null: all defaults
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint_text = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"{where} = {value!r} is not one of {list(arguments)}.{hint_text}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1 and isinstance(value, list):
            return _convert(options[0], value, where)  # its message names the entry
        for option in options:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        names = " or ".join(_type_name(option) for option in arguments)
        raise ConfigError(f"{where} = {value!r} must be of type {names}, not {type(value).__name__}.")
    if hint is Any:
        return value
    if origin is list and isinstance(value, list | tuple):
        return [_convert(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} = {value!r} must be of type {_type_name(hint)}, not {type(value).__name__}.")


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
