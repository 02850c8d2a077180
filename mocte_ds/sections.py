"""Turns sections of JSON and YAML into dataclasses; what is unknown, of a wrong type or out of bounds is refused."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from mocte_ds.bounds import ANY_FLOAT, ANY_INT, Bounds
from mocte_ds.errors import ConfigError
from mocte_ds.plain_values import require_plain
from mocte_ds.shown import name_shown, nearest, shown

Section = TypeVar("Section")


class _WrongType(ConfigError):
    """The value is of another type than the field."""


def parse_section(cls: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Build a dataclass from a mapping; nested dataclasses from nested mappings.

    Args:
        cls: dataclass with type hints built from int, float, bool, str, Literal, list, dict, dataclasses, and Annotated
            with :class:`~mocte_ds.bounds.Bounds`.
        values: keys and values as read from JSON or YAML.
        where: path of the section, for messages, e.g. "mocte.router".

    Raises:
        ConfigError: unknown key (with the nearest valid one), or a value of the wrong type or out of its bounds (with
            what is allowed).
    """
    if not isinstance(values, Mapping):
        raise _WrongType(f"{where} must be a section with keys, not {shown(values)}.")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in hints:
            raise ConfigError(
                f"unknown key {where}.{name_shown(key)} (value {shown(values[key])}).{nearest(key, hints)} "
                f"Allowed: {', '.join(sorted(hints))}."
            )
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def check_section(section: Any, where: str) -> None:
    """Check types and bounds of a dataclass that was built by hand, as :func:`parse_section` does.

    Raises:
        ConfigError: a value of the wrong type or out of its bounds.
    """
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        _convert(hint, getattr(section, name), f"{where}.{name}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for, or ConfigError."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            check_section(value, where)
            return value
        return parse_section(hint, {} if value is None else value, where)  # null: all defaults
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded(arguments, value, where)
    if origin is Literal:
        if any(value is choice or (isinstance(value, str) and value == choice) for choice in arguments):
            return value
        raise ConfigError(
            f"{where} = {shown(value)} is not one of {list(arguments)}.{nearest(value, map(str, arguments))}"
        )
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, where)
    if hint is Any:
        require_plain(value, where)
        return value
    if origin is list and isinstance(value, list | tuple):
        return [_convert(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {
            _convert(arguments[0], key, f"{where}: the key {name_shown(key)}"): _convert(
                arguments[1], item, f"{where}.{name_shown(key)}"
            )
            for key, item in value.items()
        }
    return _plain(hint, value, where)


def _plain(hint: Any, value: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        if isinstance(value, int):
            ANY_INT.check(value, where)
        ANY_FLOAT.check(value, where)
        return float(value)
    if hint is int and number and isinstance(value, int):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise _WrongType(f"{where} = {shown(value)} must be of type {_type_name(hint)}, not {type(value).__name__}.")


def _bounded(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    converted = _convert(arguments[0], value, where)
    for bounds in arguments[1:]:
        if isinstance(bounds, Bounds):
            bounds.check(converted, where)
    return converted


def _one_of(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first of several types that takes the value."""
    if value is None and type(None) in arguments:
        return None
    options = [option for option in arguments if option is not type(None)]
    if len(options) == 1 and isinstance(value, list | Mapping):
        return _convert(options[0], value, where)  # its message names the entry
    for option in options:
        try:
            return _convert(option, value, where)
        except _WrongType:
            continue
    names = " or ".join(_type_name(option) for option in arguments)
    raise _WrongType(f"{where} = {shown(value)} must be of type {names}, not {type(value).__name__}.")


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Annotated:
        return _type_name(typing.get_args(hint)[0])
    arguments = ", ".join(_type_name(part) for part in typing.get_args(hint))
    return f"{hint.__name__}[{arguments}]" if arguments else str(getattr(hint, "__name__", hint))
