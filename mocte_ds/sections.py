"""Sections of JSON and YAML as dataclasses; what is unknown, of a wrong type or out of bounds is refused."""

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from mocte_ds.errors import ConfigError
from mocte_ds.shown import name_shown, nearest, shown
from mocte_ds.value_bounds import MOST_LEVELS, require_plain

T = TypeVar("T")

# Schemas are built when they are first used: an import that only names a section must not wait for them.
_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

_UNIONS = (typing.Union, types.UnionType)
LARGEST = 2**31 - 1
"""Of an integer that has no other upper bound: all that we count fits."""
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = CountOrZero
"""numpy and torch take no negative ones."""
Plain = Annotated[Any, AfterValidator(lambda value: require_plain(value, "") or value)]
"""Whatever JSON can hold."""
PLACES: dict[type, str] = {}
"""Sections, and where each stands in its file."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def section(where: str) -> Callable[[type[T]], type[T]]:
    """Decorator for a frozen dataclass whose values are checked whenever one is made.

    A field has a plain type, an alias of this module, or Annotated with the bounds of pydantic's Field; its docstring
    says what it means. Rules that bind several fields stand in `__post_init__`, which raises ConfigError with a message
    that begins with the name of a field.

    Args:
        where: path of the section in its file, for messages, e.g. "mocte.router".
    """

    def make(cls: type[T]) -> type[T]:
        hooks: Any = cls
        hooks.__get_pydantic_core_schema__ = classmethod(_schema)
        hooks.defaults_for_null = model_validator(mode="before")(_defaults_for_null)
        made: Any = dataclass(frozen=True, config=_CONFIG)(cls)
        _refuse_in_our_words(made)
        PLACES[made] = where
        return made

    return make


def parse_section(cls: type[T], values: Mapping[str, Any]) -> T:
    """A section from keys and values as read from JSON or YAML; null stands for all defaults.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a value that is missing, of the wrong type or out of
            its bounds (with what is allowed), or a contradiction.
    """
    return _refusing(TypeAdapter(cls).validate_python, cls)(values)


def meanings(cls: type) -> dict[str, str]:
    """The docstring of each field of a section, on one line."""
    tree: Any = ast.parse(inspect.getsource(cls)).body[0]
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def type_name(hint: Any) -> str:
    """A type as people read it, e.g. `int or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in _UNIONS:
        return " or ".join(type_name(option) for option in arguments)
    if origin:
        return f"{origin.__name__}[{', '.join(type_name(part) for part in arguments)}]"
    return "null" if hint is types.NoneType else "section" if is_dataclass(hint) else hint.__name__


def bounds(hint: Any) -> str:
    """What a number must be, e.g. `1 or more`; nothing where all are allowed."""
    infos = [info for info in typing.get_args(without_null(hint))[1:] if isinstance(info, FieldInfo)]
    limits = {name: limit for info in infos for item in info.metadata for name, limit in asdict(item).items()}
    low, high = limits.get("ge"), limits.get("le")
    if "gt" in limits:
        return f"greater than {limits['gt']}" + ("" if high is None else f" and at most {high}")
    if "lt" in limits:
        return f"at least {low} and less than {limits['lt']}"
    if low is None:
        return "" if high in (None, LARGEST) else f"{high} or less"
    return f"{low} or more" if high in (None, LARGEST) else f"between {low} and {high}"


def without_null(hint: Any) -> Any:
    """A type without the option of null."""
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    return options[0] if typing.get_origin(hint) in _UNIONS and len(options) == 1 else hint


def _schema(cls: type, source: Any, handler: Callable[[Any], Any]) -> Any:
    """Pydantic's schema of a section, which takes mappings: a strict dataclass would take instances only."""
    _refuse_in_our_words(cls)  # again: pydantic makes a new __init__ before it asks for the schema
    schema = inner = handler(source)
    while inner["type"] != "dataclass":
        inner = inner["schema"]
    inner["strict"] = False
    return schema


def _refuse_in_our_words(cls: Any) -> None:
    if not hasattr(cls.__init__, "__wrapped__"):
        cls.__init__ = _refusing(cls.__init__, cls)


def _defaults_for_null(values: Any) -> Any:
    if values is None:
        return {}
    return {key: _plain(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _plain(value: Any, level: int = 0) -> Any:
    """Tuples and mappings of a config that was written in Python, as a file would have them.

    What lies deeper than any value of ours stays as it is, to be refused: it may refer to itself.
    """
    if level > MOST_LEVELS:
        return value
    if isinstance(value, Mapping):
        return {key: _plain(inner, level + 1) for key, inner in value.items()}
    return [_plain(inner, level + 1) for inner in value] if type(value) in (list, tuple) else value


def _refusing(make: Callable[..., Any], cls: type) -> Callable[..., Any]:
    """``make`` with our errors in place of pydantic's."""

    @functools.wraps(make)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        # A key that is missing may be there with a typing error.
        raise ConfigError(_message(cls, min(errors, key=lambda one: one["type"] == "missing")))

    return checked


def _message(cls: type, error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words."""
    kind, value, loc = error["type"], error["input"], error["loc"]
    path, hint, owner = _place(cls, loc)
    if kind == "value_error":
        told = str(error["ctx"]["error"])
        return f"{path}.{told}".removeprefix(".") if told[:1].isalpha() else f"{path}{told}"
    if kind == "missing":
        return f"{path} is missing. {meanings(owner)[loc[-1]]}"
    if kind == "dataclass_type":
        return f"{path} must be a section with keys, not {shown(value)}."
    if is_dataclass(without_null(hint)):
        is_text = kind == "unexpected_keyword_argument"
        return _unknown_key(path, owner, loc[-1] if is_text else value, f" (value {shown(value)})" if is_text else "")
    if loc[-1] == "[key]":
        return f"{path}: the key must be a text, not {shown(value)}."
    return _wrong_value(path, hint, error)


def _unknown_key(path: str, owner: type, key: Any, value: str) -> str:
    names = sorted(f.name for f in fields(owner))
    return f"unknown key {path}.{name_shown(key)}{value}.{nearest(key, names)} Allowed: {', '.join(names)}."


def _wrong_value(path: str, hint: Any, error: Mapping[str, Any]) -> str:
    kind, value, bare = error["type"], error["input"], without_null(hint)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if typing.get_origin(bare) is Literal:
        choices = typing.get_args(bare)
        return f"{path} = {shown(value)} is not one of {list(choices)}.{nearest(value, choices)}"
    if kind == "finite_number" or (kind == "float_type" and is_number):
        return f"{path} = {shown(value)} must be a finite number."
    if kind.endswith("_type"):
        return f"{path} = {shown(value)} must be of type {type_name(hint)}, not {type(value).__name__}."
    if "ctx" not in error:
        return f"{path} = {shown(value)}: {error['msg']}."
    if type_name(bare) == "float":
        return f"{path} = {float(value)} must {f'be {bounds(hint)}'.replace('be 0 or more', 'not be negative')}."
    ((name, limit),) = error["ctx"].items()
    return f"{path} = {shown(value)} must be {limit} or {'more' if name == 'ge' else 'less'}."


def _place(cls: Any, loc: tuple[Any, ...]) -> tuple[str, Any, Any]:
    """The path of a value, its type, and the section that it is in; of an unknown key those of the section."""
    path, hint, owner = PLACES[cls], cls, cls
    for part in loc:
        bare = without_null(hint)
        arguments = typing.get_args(bare)
        if is_dataclass(bare):
            owner, hints = bare, typing.get_type_hints(bare, include_extras=True)
            if part not in hints:
                break
            path, hint = f"{path}.{part}".removeprefix("."), hints[part]
        elif typing.get_origin(bare) is list:
            path, hint = f"{path}[{part}]", arguments[0]
        elif typing.get_origin(bare) is dict and part != "[key]":
            path, hint = f"{path}.{name_shown(part)}", arguments[1]
        else:
            break
    return path, hint, owner
