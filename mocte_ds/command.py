"""The console command `mocte-ds TOOL [options]`: the tools of this project wherever the package is installed."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from mocte_ds.cli import run_cli
from mocte_ds.errors import ConfigError

CHECKOUT_ONLY = ("benchmark", "study")
"""Tools that measure and compare this project; what they need is not in the wheel."""


def tools() -> dict[str, str]:
    """Names of the tools and the first sentence of each."""
    found = importlib.util.find_spec("mocte_ds.tools")
    folders = list(found.submodule_search_locations or []) if found else []
    paths = sorted(path for folder in folders for path in Path(folder).glob("*.py") if not path.stem.startswith("_"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in paths}
    absent = [name for name in CHECKOUT_ONLY if importlib.util.find_spec(f"mocte_ds.{name}") is None]
    return {name: text.partition("\n")[0] for name, text in docstrings.items() if name not in absent}


def main() -> None:
    """Start the tool that the first word names."""
    run_cli(_run)


def _run() -> int | None:
    known = tools()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: mocte-ds TOOL [options]      mocte-ds TOOL --help\n")
        print("\n".join(f"  {name:<18} {text}" for name, text in known.items()))
        return 0
    name = sys.argv[1].replace("-", "_")
    if name in CHECKOUT_ONLY and name not in known:
        raise ConfigError(f"'{name}' needs a checkout of the project: python tools/{name}.py there.")
    if name not in known:
        raise ConfigError(f"there is no tool '{sys.argv[1]}'; tools: {', '.join(known)}.")
    sys.argv = [f"mocte-ds {name}", *sys.argv[2:]]
    return importlib.import_module(f"mocte_ds.tools.{name}").main()


if __name__ == "__main__":
    main()
