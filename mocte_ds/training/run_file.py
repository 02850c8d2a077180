"""Reads YAML run files and changes from the command line into plain values, with errors that name the place."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mocte_ds.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number and `off` a word, as in YAML 1.2; PyYAML reads 1.1.

    A key that stands twice in a section is refused: PyYAML would take the last one without a word.
    """

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key '{key.value}' is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


_OWN = {
    "tag:yaml.org,2002:bool": (re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "tag:yaml.org,2002:float": (re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"), "-+.0123456789"),
}
_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in _OWN]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _OWN.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))


def read_values(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a run file as plain values.

    Args:
        path: YAML file; its `deepspeed` is a section, or the path of a JSON file relative to the run file or to the
            working folder.
        changes: `section.key=value` each, value in YAML; they win over the file.

    Raises:
        ConfigError: a file that cannot be read, or a change that cannot be applied.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no run file: it must have the sections model, data, training and deepspeed.")
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = _read_json(values["deepspeed"], path)
    for change in changes:
        _apply(values, change)
    return values


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file.

    Raises:
        ConfigError: a file that cannot be read; in one line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _read_json(where: str, run_file: Path) -> dict[str, Any]:
    for candidate in (run_file.parent / where, Path(where)):
        if candidate.is_file():
            try:
                return json.loads(candidate.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{candidate} is no JSON: {error}.") from error
    raise ConfigError(
        f"{run_file}: deepspeed = {where!r} is no file (looked beside the run file and in the working folder)."
    )


def _apply(values: dict[str, Any], change: str) -> None:
    key, separator, text = change.partition("=")
    parts = key.split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {change!r}: write section.key=value, e.g. --set training.steps=100.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change!r}: the value is no YAML: {error}") from error
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {change!r}: {part} is a value, not a section.")
    section[parts[-1]] = value
