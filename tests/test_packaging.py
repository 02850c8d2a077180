"""setup.py declares what is imported, and the plugin does without the extras."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mocte_ds import command as command_line
from mocte_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ("clusters", "controller", "dist", "moe", "spectrum", "trainability", "zero", "engine.py", "config.py")
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "lm_eval": "lm-eval", "megatron": "megatron-core"}
"""Packages whose distribution has another name."""


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """Names of the distributions that setup.py requires, and those of each extra."""
    found: dict = {}
    code = re.sub(r"from setuptools import.*", "", (ROOT / "setup.py").read_text(encoding="utf-8"))
    names = {
        "__file__": str(ROOT / "setup.py"),
        "setup": lambda **given: found.update(given),
        "find_namespace_packages": lambda include, exclude: [],
    }
    exec(compile(code, "setup.py", "exec"), names)

    def plain(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!~\[ ]", text)[0].lower() for text in requirements}

    return plain(found["install_requires"]), {name: plain(listed) for name, listed in found["extras_require"].items()}


def imported(path: Path) -> set[str]:
    """Roots of the third-party packages that a file imports, anywhere in it."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots.update(name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots - set(sys.stdlib_module_names) - {"mocte_ds", "__future__"}


def test_every_imported_package_is_declared() -> None:
    core, extras = declared()
    for path in sorted((ROOT / "mocte_ds").rglob("*.py")):
        first = path.relative_to(ROOT / "mocte_ds").parts[0]
        allowed = core if first in PLUGIN else core | extras["all"]
        used = {DISTRIBUTIONS.get(root, root) for root in imported(path)}
        assert used <= allowed, f"{path} imports {sorted(used - allowed)}"


def test_all_is_all_but_what_developers_need() -> None:
    _, extras = declared()
    parts = [names for name, names in extras.items() if name not in ("all", "dev")]
    assert extras["all"] == set().union(*parts)


def test_packages_of_the_extras_are_named_with_their_extra() -> None:
    from mocte_ds.cli import _EXTRAS as told

    core, extras = declared()
    for package, extra in told.items():
        name = {"google": "protobuf"}.get(package, DISTRIBUTIONS.get(package, package))
        assert name in extras[extra] and name not in core, package
    named = {{"google": "protobuf"}.get(package, DISTRIBUTIONS.get(package, package)) for package in told}
    assert named == extras["all"]


WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
import torch
{code}
"""


def run(code: str) -> subprocess.CompletedProcess:
    from mocte_ds.cli import _EXTRAS as told

    text = WITHOUT_EXTRAS.format(blocked=set(told), code=code)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_plugin_does_without_the_extras() -> None:
    done = run("import mocte_ds\nprint(mocte_ds.initialize.__name__, mocte_ds.MocteEngine.__name__)")
    assert done.returncode == 0 and done.stdout.split() == ["initialize", "MocteEngine"], done.stderr


def test_a_tool_without_its_package_says_which_extra_to_install() -> None:
    done = run("sys.argv = ['mocte-ds', 'study', 'x.yaml']\nfrom mocte_ds.command import main\nmain()")
    assert done.returncode == 2 and "pip install 'mocte-ds[train]'" in done.stderr, done.stderr


def test_the_wheel_has_no_benchmarks_and_no_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as pip builds it, and looked into."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", ".cache", "runs", "site", "build"))
    command = [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {"mocte_ds/engine.py", "mocte_ds/plan/hardware.yaml", "mocte_ds/tools/plan.py"} <= set(names)
    assert not [name for name in names if re.match(r"mocte_ds/(benchmark|study)/|tests/", name)]
    found = importlib.util.find_spec
    gone = ("mocte_ds.benchmark", "mocte_ds.study")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in gone else found(name, *more))
    assert "plan" in command_line.tools() and not set(command_line.CHECKOUT_ONLY) & command_line.tools().keys()
    monkeypatch.setattr(sys, "argv", ["mocte-ds", "benchmark", "step"])
    with pytest.raises(ConfigError, match="needs a checkout"):
        command_line._run()
