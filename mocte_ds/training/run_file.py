"""Reads YAML run files and changes from the command line into plain values, with errors that name the place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.json_files import read_json
from mocte_ds.paths import is_file
from mocte_ds.shown import name_shown, shown
from mocte_ds.yaml_files import parse_yaml, read_yaml


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
        raise ConfigError(f"{path} is not a run file: it must have the sections model, data, training and deepspeed.")
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = _read_json(values["deepspeed"], path)
    for change in changes:
        _apply(values, change)
    return values


def _read_json(where: str, run_file: Path) -> Any:
    for candidate in (run_file.parent / where, Path(where)):
        if is_file(candidate):
            return read_json(candidate)
    raise ConfigError(
        f"{run_file}: deepspeed = {shown(where)} is not a file (looked beside the run file and in the working folder)."
    )


def _apply(values: dict[str, Any], change: str) -> None:
    key, separator, text = change.partition("=")
    parts = key.split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {shown(change)}: write section.key=value, e.g. --set training.steps=100.")
    value = parse_yaml(text, f"--set {shown(change)}: the value is not YAML")
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {shown(change)}: {name_shown(part)} is a value, not a section.")
    section[parts[-1]] = value
