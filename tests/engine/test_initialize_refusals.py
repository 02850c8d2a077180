"""What initialize refuses before any work starts: JSON configs that Python or DeepSpeed would take without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mocte_ds.engine import initialize
from mocte_ds.errors import ConfigError

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "mocte": {"modules": "model.layers.*.mlp", "total_steps": 200},
}
GOOD = json.dumps(CONFIG)
TEXTS = {
    "the key 'mocte' is there twice": GOOD[:-1] + ', "mocte": {"modules": "x"}}',
    "NaN is not a number": GOOD.replace("0.01", "NaN"),
    "too deep": "[" * 100_000,
    "not UTF-8": b"\xe9",
    "is not JSON": GOOD + "x",
    "must be a dict or the path": "[]",
    'has no "mocte" block': "{}",
}


@pytest.mark.parametrize("told", TEXTS)
def test_files(tmp_path: Path, told: str) -> None:
    text = TEXTS[told]
    (tmp_path / "ds.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=told):
        initialize(model=nn.Linear(1, 1), config=tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": "AdamW"}, "optimizer = 'AdamW' must be a section"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, "params.lr = 'fast' must be a number"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": float("nan")}}}, "params.lr = nan: numbers must be finite"),
        ({"optimizer": None}, 'no "optimizer"'),
        ({"zero_optimization": {"stage": True}}, "stage = True must be 0, 1, 2 or 3"),
        ({"bf16": {"enabled": "no"}}, "bf16.enabled = 'no' must be true or false"),
        ({"mocte": None}, 'has no "mocte" block'),
        ({1: 2}, "the key 1 must be a text"),
    ],
)
def test_values(changes: dict[Any, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        initialize(model=nn.Linear(1, 1), config={**CONFIG, **changes})


def test_a_model_with_other_names_of_weights() -> None:
    with pytest.raises(ConfigError, match=r"hand over the model itself, and compile in place: model.compile\(\)"):
        initialize(model=torch.compile(nn.Sequential(nn.Linear(1, 1))), config=CONFIG)
