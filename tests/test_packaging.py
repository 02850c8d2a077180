"""setup.py declares what is imported, and the plugin does without the extras."""

import ast
import email
import importlib.util
import json
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
from tests.e2e.conftest import prepared  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = {"clusters", "controller", "dist", "moe", "spectrum", "trainability", "zero", "engine.py", "config.py"}
PLUGIN |= {"checkpoints", "flops", "logs", "ownership", "watch"}
PLUGIN |= {"registry.py", "router_config.py", "engine_settings.py"}
"""What works without extras."""
NOT_OURS = "(/|^)(__pycache__|[^/]*.egg-info|.mocte-ds.json)(/|$)|^(runs|build|dist|launch/hostfile)(/|$)"
NOT_OURS += r"|^\.(git|venv|cache|coverage[^/]*|pytest_cache|ruff_cache|mypy_cache)(/|$)"
"""What .gitignore names, and git's own."""
DISTRIBUTIONS = {
    **{"sklearn": "scikit-learn", "yaml": "pyyaml", "lm_eval": "lm-eval", "megatron": "megatron-core"},
    "google": "protobuf",
}
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
        name = DISTRIBUTIONS.get(package, package)
        assert name in extras[extra] and name not in core, package
    named = {DISTRIBUTIONS.get(package, package) for package in told}
    assert named == extras["all"]


WITHOUT_EXTRAS = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in {blocked} else find(name, *more)
import torch
{code}
"""


def run(code: str, extra: str | None = None) -> subprocess.CompletedProcess:
    """Run code where of the extras' packages only those of one extra can be imported, and what those require."""
    from mocte_ds.cli import _EXTRAS as told

    there = declared()[1][extra] if extra else set()
    blocked = {package for package in told if DISTRIBUTIONS.get(package, package) not in there}
    if "transformers" in there:
        blocked -= {"yaml"}  # it requires it
    text = WITHOUT_EXTRAS.format(blocked=blocked, code=code)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_plugin_does_without_the_extras() -> None:
    done = run("import mocte_ds\nprint(mocte_ds.initialize.__name__, mocte_ds.MocteEngine.__name__)")
    assert done.returncode == 0 and done.stdout.split() == ["initialize", "MocteEngine"], done.stderr


def test_a_tool_without_its_package_says_which_extra_to_install() -> None:
    done = run("sys.argv = ['mocte-ds', 'study', 'x.yaml']\nfrom mocte_ds.command import main\nmain()")
    assert done.returncode == 2 and "pip install 'mocte-ds[train]'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("train", "from mocte_ds.training.presets import preset\nmodel = preset('quickstart')"),
        ("hf", "model = {'model_type': 'llama', 'num_hidden_layers': 1}"),
        (
            "megatron",
            "model = {'model_type': 'llama', 'num_hidden_layers': 1}\nimport mocte_ds.convert.megatron.convert",
        ),
    ],
)
def test_an_extra_brings_what_its_models_need(extra: str, code: str) -> None:
    """The tools of these extras make a model of transformers."""
    make = "from mocte_ds.training.model import TransformersModel, config_sizes\n"
    done = run(f"{make}{code}\nprint(config_sizes(TransformersModel(hf=model)).hidden_size > 0)", extra)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution, and the wheel that is built from nothing else, as an index and pip do."""
    folder = tmp_path_factory.mktemp("built")
    for name, path in files(ROOT).items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "source" / name)
    sdist = folder / "source" / _build("build_sdist", folder / "source")
    shutil.unpack_archive(sdist, folder / "unpacked")
    unpacked = next((folder / "unpacked").iterdir())
    return unpacked, unpacked / _build("build_wheel", unpacked)


def files(root: Path) -> dict[str, Path]:
    """What belongs to the project, by name relative to a folder."""
    found = {}
    for folder, below, names in os.walk(root):
        place = Path(folder).relative_to(root)
        below[:] = [name for name in below if not re.search(NOT_OURS, str(place / name))]
        found.update({str(place / name): Path(folder, name) for name in names})
    return {name: path for name, path in found.items() if not re.search(NOT_OURS, name)}


def _build(what: str, source: Path) -> str:
    command = [sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.{what}('dist'))"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return f"dist/{done.stdout.split()[-1]}"


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files as pip puts them; what it requires is that of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        folder,
        built[1],
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", "import mocte_ds; print(mocte_ds.__file__)"]
    found = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout == f"{folder / 'mocte_ds' / '__init__.py'}\n", "not what is tested"
    return folder


def tool(installed: Path, where: Path, *words: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """`mocte-ds` of the installed package, with nothing of the repository on Python's path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mocte_ds.command", *map(str, words)]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=timeout)


def test_the_source_distribution_is_complete(built: tuple[Path, Path]) -> None:
    wanted, unpacked = files(ROOT), files(built[0])
    assert not wanted.keys() - unpacked.keys(), "not in the source distribution"
    assert unpacked.keys() - wanted.keys() <= {"PKG-INFO", "setup.cfg"}
    assert all(unpacked[name].read_bytes() == path.read_bytes() for name, path in wanted.items())


def test_the_wheel_has_what_runs_and_no_benchmarks(built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))))
    assert {"mocte_ds/engine.py", "mocte_ds/plan/hardware.yaml", "mocte_ds/tools/plan.py", "mocte_ds/py.typed"} <= names
    for pattern in ("launch/*.py", "launch/runs/*.yaml", "launch/studies/*.yaml", "ds_configs/*.json", "tools/*.py"):
        files = {f"mocte_ds/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
        assert files and files <= names, pattern
    assert not [name for name in names if re.match(r"mocte_ds/benchmark/|tests/", name)]
    links = re.findall(r"\]\(([^)]*)\)", str(metadata.get_payload()))
    assert all(link.startswith("https://") for link in links), "a link into the repository leads nowhere"
    assert "tools/prepare_data.py" in str(metadata.get_payload())
    found = importlib.util.find_spec
    gone = ("mocte_ds.benchmark",)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in gone else found(name, *more))
    assert "plan" in command_line.tools() and not set(command_line.CHECKOUT_ONLY) & command_line.tools().keys()
    monkeypatch.setattr(sys, "argv", ["mocte-ds", "benchmark", "step"])
    with pytest.raises(ConfigError, match="needs a checkout"):
        command_line._run()


@pytest.mark.usefixtures("deepspeed_op")
def test_the_wheel_trains_by_the_name_of_a_run_file(installed: Path, prepared: Path, tmp_path: Path) -> None:  # noqa: F811
    sizes = "hidden_size=32 model.intermediate_size=48 model.num_hidden_layers=1"
    length = "steps=4 training.batch_tokens=512 training.micro_batch=4 training.warmup_steps=1 training.context=32"
    checks = "every=4 evaluation.sequences_per_domain=1"
    changes = f"model.{sizes} training.{length} evaluation.{checks} data.prepared={prepared}".split()
    options = [word for change in changes for word in ("--set", change)]
    done = tool(installed, tmp_path, "pretrain", "--run", "quickstart", "--processes", 2, *options, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3, 4]
    run = json.loads((tmp_path / "runs" / "quickstart" / "run.json").read_text())
    assert run["world_size"] == 2
    assert not list((installed / "mocte_ds").glob(".cache")), "what is compiled is the user's, not the package's"


def test_the_wheel_knows_its_studies_tasks_and_version(installed: Path, tmp_path: Path) -> None:
    done = tool(installed, tmp_path, "study", "smoke", "--list")
    assert done.returncode == 0 and "loss-free-seed0" in done.stdout, done.stderr
    done = tool(installed, tmp_path, "--version")
    assert done.returncode == 0 and done.stdout.startswith("mocte-ds "), done.stderr
    done = tool(installed, tmp_path, "quickstart", "--help")
    assert done.returncode == 0 and "--fresh" in done.stdout, done.stderr
    done = tool(installed, tmp_path, "tasks", tmp_path / "tasks")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'tasks'}\n", done.stderr
    text = (tmp_path / "tasks" / "openbookqa_offline.yaml").read_text(encoding="utf-8")
    data = re.findall(r'"([^"]*\.jsonl\.gz)"', text)
    assert len(data) == 1 and Path(data[0]).is_file() and Path(data[0]).is_relative_to(installed)
