"""Reads YAML files as YAML 1.2, of plain values only; what YAML 1.1 reads as another value is refused with its line."""

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from mocte_ds.errors import ConfigError
from mocte_ds.json_files import read_text
from mocte_ds.shown import name_shown, path_shown
from mocte_ds.value_bounds import MOST, MOST_LEVELS

MOST_BYTES = 1 << 20
"""Of a file; PyYAML reads about 100 kB in a second, and a run file has 2 kB."""
MOST_VALUES = 100_000
"""Of a file with its aliases written out: a few lines of aliases of aliases can stand for more than any memory."""

_TAG = "tag:yaml.org,2002:"
_RESOLVED = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (
        "old-number",
        r"[-+]?(0b[01_]+|0[0-9_]+|0x[0-9a-fA-F]*_[0-9a-fA-F_]*|[0-9]+_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"
        r"|[0-9]*\.[0-9]*_[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
        r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?",
        list("-+.0123456789"),
    ),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file.

    Raises:
        ConfigError: a file that cannot be read; in one line, with the place.
    """
    return parse_yaml(read_text(path, MOST_BYTES), f"cannot read {path_shown(path)}")


def parse_yaml(text: str, what: str) -> Any:
    """Plain values of YAML: texts as keys; texts, numbers, booleans, null, lists and sections as values.

    Args:
        text: YAML.
        what: how the message begins.

    Raises:
        ConfigError: not YAML, a key that stands twice in a section, another type, a number that is NaN, infinite or of
            more than 64 bits, a number or date of YAML 1.1, or more nesting or values than our files have.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{what}: it is too deep or too large ({type(error).__name__}).") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's reader of YAML 1.1 with the scalars of YAML 1.2 and bounds."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """id of a finished node to the values and the levels in it."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= MOST_LEVELS:  # PyYAML's time grows with the square of the brackets that are open
            raise yaml.scanner.ScannerError(None, None, _TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._level += 1
        if self._level > MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, mark)
        node: Any = super().compose_node(parent, index)
        self._level -= 1
        if not alias:
            self._sizes[id(node)] = self._size(node)
        elif id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "a section that holds itself", mark)
        values, levels = self._sizes[id(node)]
        if levels > MOST_LEVELS or values > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP if levels > MOST_LEVELS else _TOO_MANY, mark)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes = [self._sizes[id(part)] for part in inner]
        return 1 + sum(values for values, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be a text", key.start_mark)
            if key.value in seen:
                told = f"the key '{name_shown(key.value)}' is there twice"
                raise yaml.composer.ComposerError(None, None, told, key.start_mark)
            seen.add(key.value)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "expected a section with keys", node.start_mark)
        self.flatten_mapping(node)
        return {self.construct_scalar(key): self.construct_object(value, deep) for key, value in node.value}

    def construct_scalar(self, node: Any) -> str:
        text = super().construct_scalar(node)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConstructorError(None, None, "not Unicode text", node.start_mark) from error
        if "\0" in text:
            raise ConstructorError(None, None, "a text with a zero character", node.start_mark)
        return text

    def null(self, node: yaml.Node) -> None:
        _match("null", self.construct_scalar(node), node)

    def boolean(self, node: yaml.Node) -> bool:
        return _match("bool", self.construct_scalar(node), node).lower() == "true"

    def integer(self, node: yaml.Node) -> int:
        text = _match("int", self.construct_scalar(node), node)
        value = MOST + 1
        if len(text) <= 22:
            value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if abs(value) > MOST:
            told = f"the number {name_shown(text)} is too large: it must fit into 64 bits"
            raise ConstructorError(None, None, told, node.start_mark)
        return value

    def number(self, node: yaml.Node) -> float:
        text = _match("float", self.construct_scalar(node), node)
        value = math.inf if "n" in text.lower() else float(text)
        if not math.isfinite(value):
            raise ConstructorError(None, None, f"{name_shown(text)}: numbers must be finite", node.start_mark)
        return value

    def old_number(self, node: yaml.Node) -> None:
        told = (
            f"{name_shown(self.construct_scalar(node))} is a number or a date in YAML 1.1 and none in 1.2; write it in "
            "another way (1000, not 1_000; 0o17, not 017), or put it into quotes if it is a text"
        )
        raise ConstructorError(None, None, told, node.start_mark)


def _match(kind: str, text: str, node: yaml.Node) -> str:
    """The text of a node whose tag is written down, such as `!!int x`, may be anything."""
    if not _PATTERNS[kind].fullmatch(text):
        raise ConstructorError(None, None, f"{name_shown(text)!r} is not of type {kind}", node.start_mark)
    return text


_TOO_DEEP = f"more than {MOST_LEVELS} sections or lists within each other"
_TOO_MANY = f"its aliases stand for more than {MOST_VALUES:,} values"
_PATTERNS = {kind: re.compile(pattern) for kind, pattern, _ in _RESOLVED}
for _kind, _pattern, _first in _RESOLVED:
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_CONSTRUCTORS: tuple[tuple[str, Any], ...] = (
    ("null", _Loader.null),
    ("bool", _Loader.boolean),
    ("int", _Loader.integer),
    ("float", _Loader.number),
    ("old-number", _Loader.old_number),
    ("str", _Loader.construct_scalar),
    ("seq", _Loader.construct_yaml_seq),
    ("map", _Loader.construct_yaml_map),
)
for _kind, _construct in _CONSTRUCTORS:
    _Loader.yaml_constructors[f"{_TAG}{_kind}"] = _construct
_Loader.yaml_constructors[None] = _Loader.construct_undefined
