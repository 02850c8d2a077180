"""A run file with data that is only named, and a way to write study files beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mocte_ds.data import Manifest
from mocte_ds.data.manifest import FORMAT

RUN = {
    "model": {"preset": "quickstart"},
    "training": {"steps": 300, "batch_tokens": 8192},
    "deepspeed": {
        "bf16": {"enabled": True},
        "mocte": {
            "modules": "model.layers.*.mlp",
            "num_experts": 4,
            "ep_size": 2,
            "router": {"kind": "token", "bias": False},
        },
    },
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file in `runs/`; its data has a manifest and nothing else."""
    data = tmp_path / "data"
    data.mkdir()
    split = {"documents": 1, "tokens": 100}
    domains = {"law": {"source_sha256": "0", "train": split, "validation": split}}
    Manifest(FORMAT, "0", 2048, 2, 0.1, domains).write(data / "manifest.json")
    path = tmp_path / "runs" / "small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({**RUN, "data": {"prepared": str(data)}}), encoding="utf-8")
    return path


@pytest.fixture
def study_file(run_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study file from its text, or from keys in place of two plain arms."""

    def write(text: str | None = None, **keys: Any) -> Path:
        path = tmp_path / "studies" / "some.yaml"
        path.parent.mkdir(exist_ok=True)
        values = {
            "run": "../runs/small.yaml",
            "processes": 2,
            "arms": {"dense": {"deepspeed.mocte": None}, "blocks": None},
            **keys,
        }
        values = {key: value for key, value in values.items() if value != "left out"}
        path.write_text(yaml.safe_dump(values, sort_keys=False) if text is None else text, encoding="utf-8")
        return path

    return write
