"""Routing keys of the user's own in exports: the file goes along, and computes the same where nothing of ours is."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

from mocte_ds.base_model import base_facts, require_base
from mocte_ds.convert.hf.export import export_trained
from mocte_ds.convert.hf.load import load_model
from mocte_ds.convert.hf.user_keys import UserKeys, _without_us, carried
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe import Block
from mocte_ds.moe.keys import KEYS, Key
from mocte_ds.user_files import import_files
from tests.checkpoints import tiny
from tests.convert.hf.test_any_model import made, source_of
from tests.convert.hf.without_us import load_without_us

KEY = '''"""A key with buffers of every kind and settings. Märchen."""

import math

import torch
from torch import Tensor

from mocte_ds.moe.keys import (
    KEYS,  # where it is registered
    Key,
    RoutingError,
)


@KEYS.register("stretched-KIND")
class Stretched(Key):
    reads_ids, has_logits = True, False
    settings = ("rows", "centroid_rate", "std")

    def __init__(self, hidden_size, num_experts, vocab_size=None, rows=7, centroid_rate=0.5):
        super().__init__(hidden_size, num_experts, vocab_size)
        self.rows, self.shift = rows, math.floor(10 * centroid_rate)
        self.register_buffer("table", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("edges", torch.zeros(self.vocab_size))
        self.register_buffer("turned", torch.zeros(1, dtype=torch.bool))

    def fit(self, birth):
        self.table.copy_(birth.random_table(self.rows))
        # In bf16 they would all be 1.
        self.edges.copy_(1 + torch.arange(self.vocab_size) / 2048)
        self.turned.fill_(True)

    def choose(self, features: Tensor, tokens) -> Tensor:
        if tokens.ids is None:
            raise RoutingError("no ids")
        steps = ((self.edges[tokens.ids] - 1) * 2048).round().long()
        experts = self.table[(steps + tokens.ids) % self.rows] + self.shift * self.turned
        return (experts % self.num_experts).reshape(-1)
'''


def write_key(folder: Path, stem: str) -> Path:
    (folder / f"{stem}.py").write_text(KEY.replace("KIND", stem), encoding="utf-8")
    return folder / f"{stem}.py"


def exported(kind: str, folder: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A trained model whose two banks have a key of the user's own, and what its export says."""
    own = {"kind": kind, "rows": 11, "centroid_rate": 0.25}
    model: Any = made("phi3")
    base = require_base(base_facts(model), "here")
    banks = [own, {"kind": "previous"}]
    source = source_of(model, base, "model.layers.*.mlp", banks=banks, **more)
    return model, export_trained(source, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[Any, Path, Path]:
    """The model, its export, and the key's file."""
    folder = tmp_path_factory.mktemp("own")
    path = write_key(folder, "stretched")
    import_files([path])
    model, facts = exported("stretched-stretched", folder / "export")
    assert facts["architecture"] == "MocteBlocksForCausalLM" and facts["logit_difference"] < 1e-5
    return model, folder / "export", path


@torch.no_grad()
def test_it_computes_the_same_where_nothing_of_ours_is(trained: Any, tmp_path: Path) -> None:
    model, folder, _ = trained
    key = next(m for m in model.modules() if isinstance(m, Block)).banks[0].gate.key
    assert (key.rows, key.shift, key.table.unique().tolist()) == (11, 2, [0, 1, 2, 3])
    ids = tiny.ids(3, batch=3, length=24)
    expected = model(input_ids=ids).logits
    found = load_without_us(folder, ids, tmp_path)
    torch.testing.assert_close(found["fp32"], expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert torch.equal(found["bf16"], found["again"])
    kinds = {name: dtype for name, dtype in found["bf16 buffers"].items() if ".banks.0.gate.key." in name}
    for name, dtype in (("table", torch.int64), ("edges", torch.float32), ("turned", torch.bool)):
        assert {kinds[found] for found in kinds if found.endswith(f".{name}")} == {dtype}, name
    names = json.loads((folder / "checksums.json").read_text())["files"]
    assert {"user_key_stretched_mocte.py", "user_keys_mocte.py"} <= names.keys()


def test_early_transformers_find_every_file(trained: Any) -> None:
    """Version 5.0 copies what the file of the class imports itself, and not what these files import."""
    names = {path.stem for path in trained[1].glob("*_mocte.py")}
    found = get_relative_imports(trained[1] / "modeling_blocks_mocte.py")
    assert names == {"modeling_blocks_mocte", *found} and "user_key_stretched_mocte" in names


@torch.no_grad()
def test_other_settings_and_other_buffers_compute_something_else(trained: Any) -> None:
    """Else the comparison above would show nothing."""
    model, ids = trained[0], tiny.ids(3, batch=3, length=24)
    expected = model(input_ids=ids).logits
    key = next(m for m in model.modules() if isinstance(m, Block)).banks[0].gate.key
    for name, other in (("shift", 1), ("rows", 7), ("edges", key.edges.bfloat16().float())):
        kept = getattr(key, name)
        setattr(key, name, other)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2), name
        setattr(key, name, kept)


def test_loading_without_the_folders_code(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder, path = trained
    ids = tiny.ids(4, batch=2, length=9)
    loaded = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="user_key_stretched_mocte.py would be left out: .*trust_remote_code=True"):
        loaded.save_pretrained(tmp_path / "saved")
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace("10 *", "20 *"), encoding="utf-8")
        with pytest.raises(CheckpointError, match="user_key_stretched_mocte.py is not the file of the key"):
            load_model(folder)
    finally:
        path.write_text(text, encoding="utf-8")
    monkeypatch.delitem(KEYS._items, "stretched-stretched")
    with pytest.raises(ConfigError, match="kind = 'stretched-stretched' is not one of .*--import FILE"):
        load_model(folder)
    with pytest.raises(ValueError, match="'stretched-stretched' is not known here.*trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    import_files([write_key(tmp_path, "changed")])
    exported("stretched-changed", tmp_path / "export")
    file = tmp_path / "export" / "user_key_changed_mocte.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"user_key_changed_mocte.py is not what checksums.json says"):
        load_model(tmp_path / "export")


def test_a_copy_that_routes_another_way_is_not_written(tmp_path: Path) -> None:
    """The file was changed after the run had imported it."""
    path = write_key(tmp_path, "edited")
    import_files([path])
    path.write_text(path.read_text(encoding="utf-8").replace("10 *", "20 *"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="logits differ from the trained model's"):
        exported("stretched-edited", tmp_path / "export")
    assert not (tmp_path / "export").exists()


REFUSED = {
    "import deepspeed": "line 1: `import deepspeed` does not go along",
    "import os\nimport neighbour": "line 2: `import neighbour` does not go along",
    "from . import neighbour": "line 1: `from . import ...` does not go along",
    "def f():\n    import mocte_ds": "line 2: `import mocte_ds` does not go along",
    "from mocte_ds.trainability import policy": "mocte_ds.moe.keys alone",
    "from mocte_ds.moe.keys import KEYS, key_class": "line 1: `from mocte_ds.moe.keys import ...`",
    "def f(:": "invalid syntax|was never closed",
    "# -*- coding: latin-1 -*-": "it is written in iso-8859-1",
}


@pytest.mark.parametrize("words", REFUSED)
def test_files_that_need_what_is_not_there(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(words, encoding="utf-8")
    module, key = ModuleType("mine"), type("Mine", (Key,), {"__module__": "mine"})
    module.__file__, module.Mine = str(path), key  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    with pytest.raises(CheckpointError, match=f"'mine' cannot be exported: .*mine.py: .*({REFUSED[words]})"):
        carried("mine", key)


def test_what_stands_for_our_modules() -> None:
    """In place, whatever stands around it."""
    text = (
        "é = 1; from mocte_ds.moe.keys import KEYS\nif é:\n    from mocte_ds.remote_code.tokens_mocte import Tokens\n"
    )
    assert _without_us(text) == (
        "é = 1; from .known_keys_mocte import KEYS\nif é:\n    from .tokens_mocte import Tokens\n"
    )


def test_classes_without_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Within(Key):
        pass

    with pytest.raises(CheckpointError, match="Within of .*test_user_keys.py is made within a function"):
        carried("within", Within)
    for name in ("__main__", "of-a-notebook"):
        with pytest.raises(CheckpointError, match="defined in the script that runs, or in a notebook"):
            carried("x", type("X", (Key,), {"__module__": name}))


def test_tensors_that_no_file_keeps(trained: Any) -> None:
    model = trained[0]
    block = next(m for m in model.modules() if isinstance(m, Block))
    key = block.banks[0].gate.key
    for change, told in (
        (lambda: setattr(key, "loose", torch.zeros(2)), "loose is a tensor and no buffer"),
        (lambda: key.register_buffer("gone", torch.zeros(2), persistent=False), "its buffer gone is not persistent"),
        (lambda: key.register_buffer("fine", torch.zeros(2).double()), "its buffer fine is torch.float64"),
    ):
        change()
        with pytest.raises(CheckpointError, match=f"'stretched-stretched' cannot be exported: {told}"):
            UserKeys.of([block])
        for name in ("loose", "gone", "fine"):
            if hasattr(key, name):
                delattr(key, name)
    assert UserKeys.of([block]).files == {"stretched-stretched": "user_key_stretched_mocte.py"}


def test_files_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise RuntimeError('of my own')", encoding="utf-8")
    (tmp_path / "json.py").write_text("", encoding="utf-8")
    for name, told in (
        ("nothing.py", "there is no such file"),
        ("json.py", "there is a module 'json' already"),
        ("fails.py", "RuntimeError: of my own"),
    ):
        with pytest.raises(ConfigError, match=f"--import .*{name}: {told}"):
            import_files([tmp_path / name])
    assert "fails" not in sys.modules and str(tmp_path) not in sys.path
