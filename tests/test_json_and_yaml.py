"""JSON and YAML: what is read is what stands there, and everything else is one message with its place."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mocte_ds.data.documents import DocumentFile
from mocte_ds.data.manifest import Manifest as DataManifest
from mocte_ds.errors import CheckpointError, ConfigError, DataError, MocteError, NotOurs
from mocte_ds.json_files import read_json, read_object
from mocte_ds.ownership.manifest import MANIFEST_FILE
from mocte_ds.ownership.manifest import Manifest as CheckpointManifest
from mocte_ds.ownership.marker import MARKER, Marker
from mocte_ds.shown import shown
from mocte_ds.training.changes import IDENTITY_FILE, changes_so_far, read_identity
from mocte_ds.value_bounds import require_plain
from mocte_ds.yaml_files import parse_yaml, read_yaml

# From the YAML 1.2 specification, chapter 10.3 (core schema), and its differences from 1.1.
READ = {
    "3e-4": 3e-4,
    "1e-3": 1e-3,
    "12e03": 12000.0,
    "-.5": -0.5,
    "0o17": 15,
    "0x1F": 31,
    "+12": 12,
    "0": 0,
    "off": "off",
    "yes": "yes",
    "true": True,
    "TRUE": True,
    "~": None,
    "": None,
    "'1_000'": "1_000",
    '"2020-01-01"': "2020-01-01",
    "=": "=",
    "1.2.3": "1.2.3",
    "[1, 2]": [1, 2],
    "{a: {b: 1}}": {"a": {"b": 1}},
    "{1: a, true: b}": {"1": "a", "true": "b"},
}


@pytest.mark.parametrize(("text", "value"), READ.items(), ids=READ.keys())
def test_yaml_is_read_as_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, "x")
    assert found == value and type(found) is type(value)


REFUSED = {
    "1_000": "1_000 is a number",
    "017": "017 is a number",
    "08": "08 is a number",
    "0b11": "0b11 is a number",
    "1:30": "1:30 is a number",
    "190:20:30.15": "is a number",
    "1_0.5": "is a number",
    "2026-01-01": "a date in YAML 1.1",
    "1e999": "must be finite",
    ".inf": "must be finite",
    ".nan": "must be finite",
    "9" * 5000: "too large",
    str(2**64): "64 bits",
    "{a: 1, a: 2}": "the key 'a' is there twice",
    "{1: a, '1': b}": "the key '1' is there twice",
    "{[1]: 2}": "a key must be a text",
    "&a [*a]": "holds itself",
    "[" * 30_000 + "]" * 30_000: "more than 64",
    "{a: " * 3000 + "1" + "}" * 3000: "more than 64",
    "- " * 3000 + "1": "more than 64",
    "!!python/name:os.system": "could not determine a constructor",
    "!!binary aGk=": "could not determine a constructor",
    "!!int x": "not of type int",
    "!!bool maybe": "not of type bool",
    '"\\ud800"': "not Unicode",
    '"\\0"': "zero character",
    "--- 1\n--- 2": "expected a single document",
    "a: [": "expected",
}


@pytest.mark.parametrize(("text", "told"), REFUSED.items(), ids=[key[:20] for key in REFUSED])
def test_yaml_that_is_refused_names_the_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read it: .*{told}.* line 1") as caught:
        parse_yaml(text, "cannot read it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_that_stand_for_more_than_memory() -> None:
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="stand for more than 100,000 values.* line 6"):
        parse_yaml("\n".join(lines), "x")
    chain = ["x0: &x0 [a]", *(f"x{i}: &x{i} [*x{i - 1}]" for i in range(1, 500))]
    with pytest.raises(ConfigError, match="more than 64"):
        parse_yaml("\n".join(chain), "x")


def test_a_file_of_ours_is_read_as_pyyaml_reads_it() -> None:
    """Where 1.1 and 1.2 agree, an independent reader agrees too."""
    text = "a: 1\nb: [x, 2.5, null, true]\nc: {d: 'x y', e: -3}\nf: |\n  two\n  lines\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1e400}', "1e400 is too large"),
        (f'{{"a": {"9" * 5000}}}', "too large"),
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ("[" * 500 + "]" * 500, "more than 64"),
        ('"\\ud800"', "not Unicode"),
        ('{"a": "\\u0000"}', "zero character"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "values.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=told) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_json_that_is_read(tmp_path: Path) -> None:
    path, values = tmp_path / "values.json", {"a": [1, 2.5, None, True, 2**64 - 1], "b": {"a": "é"}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    assert read_json(path) == values, "with a byte order mark too"


def test_json_of_others_may_hold_what_their_programs_write(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"model_max_length": 1000000000000000019884624838656, "limit": [0.0, Infinity], "x": NaN}')
    with pytest.raises(ConfigError, match="64 bits"):
        read_object(path)
    values = read_object(path, DataError, foreign=True)
    assert values["model_max_length"] == int(1e30) and values["limit"][1] == math.inf and math.isnan(values["x"])
    for text, told in {
        '{"a": 1, "a": 2}': "the key 'a' is there twice",
        "[" * 100_000: "nested too deep",
        '{"a": ' + "9" * 10**7 + "}": "10,000,000 digits",
        "[1]": "holds a list, not an object",
        "{": "is not JSON",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=told) as caught:
            read_object(path, DataError, foreign=True)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer_config.json: .*is missing"):
        read_object(path, CheckpointError)


TWICE = '"seed": 1, "seed": 2'


@pytest.mark.parametrize(
    ("name", "kind", "read"),
    [
        (IDENTITY_FILE, CheckpointError, read_identity),
        (MANIFEST_FILE, CheckpointError, CheckpointManifest.read),
        ("manifest.json", DataError, DataManifest.read),
        (MARKER, NotOurs, Marker.read),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_reader_of_a_file_that_may_be_damaged_is_the_strict_one(
    tmp_path: Path, name: str, kind: type[MocteError], read: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    for text in ("{" + TWICE + "}", "[" * 100_000, '{"a": ' + "9" * 10**6 + "}", '{"a": NaN}', "\xff", "[]"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(kind, match=name):
            read(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(kind, match="are the most"):
        read(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(kind, match="not a file"):
        read(tmp_path)
    assert changes_so_far(path, 10) == []


def test_a_line_of_a_corpus_with_two_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "score": NaN, "id": 99999999999999999999999}\n{"text": "two", "text": "three"}\n')
    found = iter(DocumentFile(path))
    assert next(found) == "one"
    with pytest.raises(DataError, match="line 2: .*'text' is there twice"):
        next(found)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes("é: 1".encode("latin-1"))
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    for path, told in (
        (tmp_path / "pipe", "it is not a file"),
        (Path("/dev/zero"), "it is not a file"),
        (tmp_path, "it is not a file"),
        (tmp_path / "latin", "is not UTF-8"),
        (tmp_path / "large", "are the most"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("a\0b"), "null"),
    ):
        for read in (read_json, read_yaml):
            with pytest.raises(ConfigError, match=f"cannot read .*{told}"):
                read(path)


def test_values_in_messages_are_short() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    cycle: dict = {}
    cycle["a"] = cycle
    for value in (deep, cycle, 10**5000, "x" * 10**6, list(range(10**5)), {str(i): [i] * 50 for i in range(100)}):
        assert len(shown(value)) < 1500
    assert shown(10**400) == "a number of 401 digits" and shown(12) == "12" and shown("é") == "'é'"
    for value in (deep, cycle, math.nan, {"a": [math.inf]}, 2**65, {"a": "\0"}):
        with pytest.raises(ConfigError, match="^w"):
            require_plain(value, "w")
