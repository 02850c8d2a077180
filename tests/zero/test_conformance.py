"""Another DeepSpeed is refused with what it breaks; and only mocte_ds/zero relies on private parts."""

import ast
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

import mocte_ds
from mocte_ds.engine import MocteEngine
from mocte_ds.errors import MocteError
from mocte_ds.zero import require_conformance
from mocte_ds.zero.conformance import OVERRIDE, broken_assumptions

ROOT = Path(mocte_ds.__file__).parent


def test_installed_version_conforms() -> None:
    assert broken_assumptions() == []
    require_conformance()


def test_unchecked_version_is_refused_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.99.0")
    with pytest.raises(MocteError, match=rf"0\.99\.0 was not checked.*no assumption visibly broke\. .*{OVERRIDE}=1"):
        require_conformance()
    monkeypatch.setenv(OVERRIDE, "1")
    with pytest.warns(UserWarning, match="no assumption visibly broke"):
        require_conformance()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (DeepSpeedZeroOptimizer, "get_partition_info"),
        (DeepSpeedZeroOptimizer, "reduce_ipg_grads"),
        (DeepSpeedEngine, "_get_zero_frozen_param_attributes"),
        (groups, "_get_expert_parallel_group"),
    ],
)
def test_what_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.99.0")
    monkeypatch.delattr(owner, name)
    with pytest.raises(MocteError, match=rf"{name} is gone"):
        require_conformance()
    monkeypatch.setenv(OVERRIDE, "1")
    with pytest.warns(UserWarning, match=rf"{name} is gone"):
        require_conformance()


def test_another_order_of_the_constructor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedZeroOptimizer, "__init__", lambda self: None)
    assert any("no longer flattens" in text for text in broken_assumptions())


def _with_a_set(self: Any) -> None:
    self.sparse_tensor_module_names = set()


def test_a_set_in_every_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.19.7 has it."""
    monkeypatch.setattr(DeepSpeedEngine, "__init__", _with_a_set)
    (broken,) = broken_assumptions()
    assert broken == "DeepSpeedEngine saves a set, sparse_tensor_module_names, which is not a plain value"


def _imports(tree: ast.AST) -> dict[str, str]:
    """Names that a file imports from DeepSpeed, and from where."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def test_private_parts_are_used_in_one_folder() -> None:
    private = ("deepspeed.runtime.zero", "deepspeed.runtime.engine", "deepspeed.runtime.checkpoint_engine")
    for path in ROOT.rglob("*.py"):
        if path.is_relative_to(ROOT / "zero"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _imports(tree)
        assert not [where for where in names.values() if where.startswith(private)], path
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and isinstance(node.value, ast.Name):
                assert node.value.id not in names, f"{path}:{node.lineno} uses {node.value.id}.{node.attr}"
    assert _imports(ast.parse((ROOT / "zero" / "engine.py").read_text(encoding="utf-8")))
    overridden = [name for name in vars(MocteEngine) if name.startswith("_") and not name.startswith("__")]
    assert not [name for name in overridden if hasattr(DeepSpeedEngine, name)]
