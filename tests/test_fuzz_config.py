"""Whatever stands in a config, a run file or a study file: a config whose values are all good, or one message."""

import copy
import dataclasses
import json
import math
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mocte_ds.config import MocteConfig
from mocte_ds.deepspeed_settings import checked_settings
from mocte_ds.errors import MocteError
from mocte_ds.study import PlannedRun, read_study
from mocte_ds.training.run_config import read_run

NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -0.5, 1e308, 5e-324]
NUMBERS += [math.nan, math.inf, -math.inf]
WORDS = ["", " ", "1", "true", "token", "ffn", "é☃", "a\0b", "*", "model.layers.*.mlp", "x" * 5000, "auto"]
NESTED: list[Any] = [[], {}, [None], [1], [[]], ["x"], {"a": 1}, {1: 2}, {"kind": "hash"}, [{"kind": "hash"}], (1, 2)]
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
ODD = [None, True, False, *NUMBERS, *WORDS, *NESTED, b"x", 1j, object()]
IN_MEMORY = [*ODD, DEEP, ENDLESS, {"a": ENDLESS}]
RUN: dict[str, Any] = {
    "model": {"preset": "quickstart"},
    "data": {"prepared": "somewhere", "weights": {"a": 1}},
    "training": {"steps": 100, "batch_tokens": 8192, "learning_rate": 1e-3, "betas": [0.9, 0.95], "seed": 1},
    "evaluation": {"every": 5},
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "mocte": {"modules": "model.layers.*.mlp", "num_experts": 4, "router": {"kind": "token"}},
    },
}
TEXTS = ["9" * 5000, "-.inf", ".nan", "1e999", "1_000", "0777", "2020-99-99", "190:20:30", "!!int x", "!!set {a}", "~"]
TEXTS += ["&a [*a]", "*nope", "{<<: 1}", "{[1]: 2}", "{a: 1, a: 2}", "[" * 999, "'", "%", "\t", "|", "!!timestamp x"]


def outcome(read: Callable[[], Any]) -> Any:
    """What was read; None for a refusal with a readable message. Any other exception goes on."""
    try:
        return read()
    except MocteError as error:
        message = str(error)
        assert message.strip() and len(message) < 4000 and message.count("\n") == 0, message[:500]
        return None


def leaves(values: Any) -> Iterator[Any]:
    """All that is neither a section nor a list."""
    if isinstance(values, dict | list | tuple):
        for inner in values.values() if isinstance(values, dict) else values:
            yield from leaves(inner)
    else:
        yield values


def require_good(values: Any) -> None:
    """Every number finite and of a size that arrays can have."""
    for leaf in leaves(values):
        assert leaf is None or isinstance(leaf, bool | int | float | str), leaf
        if isinstance(leaf, int | float):
            assert math.isfinite(leaf) and (abs(leaf) <= 2**63 or isinstance(leaf, float))


def fields_of(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields, sections too."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name], (*path, field.name))


def places(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def put(values: dict[Any, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, dict) else {}  # odd values belong to all tests
        values = values[part]
    values[path[-1]] = value


FIELDS = list(fields_of(MocteConfig))


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_every_field_with_every_odd_value(path: tuple[str, ...]) -> None:
    for odd in IN_MEMORY:
        block: dict[str, Any] = {"modules": "m"}
        put(block, path, odd)
        config = outcome(lambda block=block: MocteConfig.from_dict(block, 2))
        if config is not None:
            require_good(config.to_dict())
            assert MocteConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("seed", [0, 1])
def test_blocks(seed: int) -> None:
    rng, accepted = random.Random(seed), 0
    for _ in range(400):
        block: dict[Any, Any] = {"modules": "m"}
        for _ in range(rng.choice([1, 2, 5])):
            usual = [True, 1, 2, 4, 16, 0.1, 0.5]
            put(block, rng.choice(FIELDS), rng.choice(rng.choice([IN_MEMORY, usual])))
        if rng.random() < 0.1:
            block[rng.choice(["Router", 1, None, "é"])] = rng.choice(ODD)
        config = outcome(lambda block=block: MocteConfig.from_dict(block))
        if config is not None:
            accepted += 1
            require_good(config.to_dict())
    assert accepted > 10


@pytest.mark.parametrize("seed", [0, 1])
def test_run_files(tmp_path: Path, seed: int) -> None:
    rng, path, accepted = random.Random(seed), tmp_path / "run.yaml", 0
    known = [
        *places(RUN),
        ("model", "rope_scaling"),
        ("model", "num_hidden_layers"),
        ("model", "head_dim"),
        ("model", "init"),
        ("training", "context"),
    ]
    known += [("deepspeed", name) for name in ("fp16", "scheduler", "tensorboard", "gradient_clipping", "optimizer")]
    writable = [odd for odd in ODD if not isinstance(odd, tuple | complex) and type(odd) is not object]
    for _ in range(60):
        values = copy.deepcopy(RUN)
        for _ in range(rng.choice([1, 1, 2])):
            put(values, rng.choice(known), copy.deepcopy(rng.choice(writable)))
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        run = outcome(lambda: read_run(path))
        settings = None if run is None else outcome(lambda run=run: run.resolve(2, 2, 300))
        if settings is not None:
            accepted += 1
            json.dumps(run.identity(), allow_nan=False)
            require_good([dataclasses.asdict(run), settings])
    assert accepted


def test_texts_in_a_run_file(tmp_path: Path) -> None:
    path, text = tmp_path / "run.yaml", yaml.safe_dump(RUN)
    for odd in TEXTS:
        for known in ("learning_rate: 0.001", "num_experts: 4", "prepared: somewhere", "stage: 2"):
            assert known in text
            path.write_text(text.replace(known, f"{known.split()[0]} {odd}"), encoding="utf-8")
            run = outcome(lambda: read_run(path))
            assert run is None or known.startswith("prepared"), (odd, known)
        path.write_text(text, encoding="utf-8")
        assert outcome(lambda odd=odd: read_run(path, [f"training.steps={odd}"])) is None


def test_deepspeed_configs() -> None:
    base = {**RUN["deepspeed"], "scheduler": {"type": "WarmupLR", "params": {}}}
    for path in places(base):
        for odd in IN_MEMORY:
            values = copy.deepcopy(base)
            put(values, path, odd)
            outcome(lambda values=values: checked_settings(values))


def test_study_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    path = tmp_path / "study.yaml"
    base: dict[str, Any] = {
        "run": "run.yaml",
        "processes": 1,
        "seeds": [0],
        "baseline": "a",
        "longer": [2],
        "trial_budget": 0.5,
        "learning_rates": [],
        "set": {"training.steps": 5},
        "arms": {"a": None, "b": {"training.learning_rate": 1e-4}},
        "grid": {"deepspeed.mocte.num_experts": [2, 4]},
    }
    writable = [odd for odd in ODD if not isinstance(odd, tuple | complex) and type(odd) is not object]
    huge = {f"training.key{number}": list(range(100)) for number in range(10)}
    cases = [(place, odd) for place in places(base) for odd in writable]
    cases = [*random.Random(0).sample(cases, 60), (("grid",), huge), (("arms", "a", "training.seed"), 1)]
    for place, odd in cases:
        values = copy.deepcopy(base)
        put(values, place, odd)
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        study = outcome(lambda: read_study(path))
        if study is not None:
            outcome(lambda study=study: study.config((*study.trials(), PlannedRun(study.arms[-1], 0))[0]))
