"""What the parts of MO-CTE cost on this machine: one file a benchmark, found by `tools/benchmark.py`.

A benchmark is a module of this package with a first line that says what it measures, and

    add_arguments(parser)      its options
    run(args) -> dict          the numbers, plain JSON values; progress goes to stderr
    text(numbers) -> str       the same for people
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType


def benchmarks() -> dict[str, str]:
    """Names of the benchmarks and the first line of each, without importing them."""
    paths = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in paths}
    return {name: text.partition("\n")[0] for name, text in docstrings.items()}


def load(name: str) -> ModuleType:
    """The module of a benchmark."""
    return importlib.import_module(f"{__name__}.{name}")
