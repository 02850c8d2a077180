"""After mocte_ds.install() deepspeed.initialize makes blocks where a config asks for them, until uninstall()."""

import base64
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest

import mocte_ds
from mocte_ds.errors import MocteError
from tests.engine import runs
from tests.integrations import trainer_runs
from tests.spawn import spawn

WITH, WITHOUT = {"mocte": {"modules": "m"}}, {"mocte": None, "train_batch_size": 1}
BARE = """import sys
import mocte_ds
assert "deepspeed" not in sys.modules
import deepspeed
assert deepspeed.initialize.__module__ == "deepspeed"
import mocte_ds.auto
assert deepspeed.initialize.__wrapped__.__module__ == "deepspeed"
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Who was called with which arguments, in place of both ways to an engine."""
    made: list[tuple[str, dict[str, Any]]] = []

    def initialize(args=None, model=None, optimizer=None, config=None, mesh_param=None, config_params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        made.append(("stock", {"config": config, "config_params": config_params}))

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    monkeypatch.setattr("mocte_ds.engine.initialize", lambda **given: made.append(("mocte", given)))
    yield made
    mocte_ds.uninstall()


def test_each_config_goes_its_way(calls: list, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock = deepspeed.initialize
    with caplog.at_level(logging.WARNING, "mocte_ds"):
        mocte_ds.install()
        mocte_ds.install()
    assert [record.message for record in caplog.records if "is installed" in record.message] == [
        'mocte_ds is installed: deepspeed.initialize makes blocks if its config has a "mocte" block; '
        "mocte_ds.uninstall() undoes it."
    ]
    (tmp_path / "with.json").write_text(json.dumps(WITH))
    (tmp_path / "without.json").write_text(json.dumps(WITHOUT))
    (tmp_path / "comments.json").write_text("{# Hjson, which DeepSpeed reads\n" + json.dumps(WITH)[1:])
    encoded = base64.urlsafe_b64encode(json.dumps(WITH).encode()).decode()
    deepspeed.initialize(None, "model", config=WITH)
    deepspeed.initialize(model="model", config_params={**WITH, "steps_per_print": float("inf")})
    deepspeed.initialize(SimpleNamespace(deepspeed_config=str(tmp_path / "with.json")), "model")
    deepspeed.initialize(model="model", config=tmp_path / "comments.json")
    deepspeed.initialize(model="model", config=encoded)
    assert [name for name, _ in calls] == ["mocte"] * 5
    assert calls[0][1] == {"args": None, "model": "model", "config": WITH}
    assert calls[1][1] == {"model": "model", "config": {**WITH, "steps_per_print": sys.maxsize}}
    assert calls[2][1]["config"] == str(tmp_path / "with.json") and calls[4][1]["config"] == WITH
    calls.clear()
    for config in (WITHOUT, str(tmp_path / "without.json"), str(tmp_path / "nowhere.json"), None):
        deepspeed.initialize(model="model", config=config)
    assert calls == [
        ("stock", {"config": config, "config_params": None})
        for config in (WITHOUT, str(tmp_path / "without.json"), str(tmp_path / "nowhere.json"), None)
    ]
    mocte_ds.uninstall()
    mocte_ds.uninstall()
    assert deepspeed.initialize is stock


def test_a_replacement_by_somebody_else_is_told(calls: list) -> None:
    mocte_ds.install()
    ours = deepspeed.initialize
    deepspeed.initialize = len
    for call in (mocte_ds.install, mocte_ds.uninstall):
        with pytest.raises(MocteError, match="was replaced by builtins after"):
            call()
    deepspeed.initialize = ours


def test_a_bare_import_does_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.returncode == 0 and "mocte_ds is installed" in done.stderr, done.stderr


def with_plain_trainer(folder: str) -> list[tuple[str, list[int] | None, list[str]]]:
    """transformers' own Trainer without, with, and again without install(): class of the engine, events, modes."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import Trainer

    found = []
    for installed in (False, True, False):
        if installed:
            mocte_ds.install()
        config = trainer_runs.config(2, trainer_runs.OPTIMIZER, total_steps=trainer_runs.STEPS)
        args = trainer_runs.arguments(Path(folder), config)
        trainer = Trainer(model=runs.model(), args=args, train_dataset=trainer_runs.rows())
        trainer.train()
        engine = trainer.deepspeed
        assert isinstance(engine, DeepSpeedEngine)
        blocks = engine.mocte.blocks if hasattr(engine, "mocte") else []
        said = ""
        try:
            trainer.save_model()
        except MocteError as error:
            said = str(error)
        found.append((type(engine).__name__, [str(block.mode) for block in blocks], said))
        trainer.accelerator.free_memory()
        mocte_ds.uninstall()
    return found


def test_a_plain_trainer_has_blocks(tmp_path: Path) -> None:
    for before, during, after in spawn(with_plain_trainer, 2, str(tmp_path), timeout=240):
        assert before == after == ("DeepSpeedEngine", [], "")
        assert during[:2] == ("MocteEngine", ["specialising"] * 2)
        assert "engine.mocte.export(FOLDER)" in during[2]
