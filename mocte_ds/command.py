"""The console command `mocte-ds TOOL [options]`: the tools of this project wherever the package is installed."""

import ast
import importlib.util
import sys
from types import ModuleType

import mocte_ds
from mocte_ds.cli import run_cli
from mocte_ds.colour import paint
from mocte_ds.completion import SHELLS, script
from mocte_ds.errors import ConfigError
from mocte_ds.shipped import TOOLS
from mocte_ds.shown import name_shown, nearest

CHECKOUT_ONLY = ("benchmark",)
"""Tools that measure this project; what they need is not in the wheel."""


def tools() -> dict[str, str]:
    """Names of the tools and the first sentence of each."""
    paths = sorted(path for path in TOOLS.glob("*.py") if not path.stem.startswith("_"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in paths}
    absent = [name for name in CHECKOUT_ONLY if importlib.util.find_spec(f"mocte_ds.{name}") is None]
    return {name: text.partition("\n")[0] for name, text in docstrings.items() if name not in absent}


def main() -> None:
    """Start the tool that the first word names."""
    run_cli(_run)


def _run() -> int | None:
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word == "--version":
        print(f"mocte-ds {mocte_ds.__version__}")
        return 0
    known = tools()
    if word in ("-h", "--help"):
        print("usage: mocte-ds TOOL [options]      mocte-ds TOOL --help      mocte-ds --version")
        print("       source <(mocte-ds completion bash)                     (or zsh)\n")
        print("\n".join(f"  {paint(f'{name:<18}', 'bold', sys.stdout)} {text}" for name, text in known.items()))
        return 0
    if word == "completion":
        if len(sys.argv) != 3:
            raise ConfigError(f"mocte-ds completion SHELL: one of {', '.join(SHELLS)}.")
        print(script(sys.argv[2], known), end="")
        return 0
    name = word.replace("-", "_")
    if name in CHECKOUT_ONLY and name not in known:
        raise ConfigError(f"'{name}' needs a checkout of the project: python tools/{name}.py there.")
    if name not in known:
        raise ConfigError(f"there is no tool {name_shown(word)}.{nearest(name, known)} Tools: {', '.join(known)}.")
    sys.argv = [f"mocte-ds {name}", *sys.argv[2:]]
    return _loaded(name).main()


def _loaded(name: str) -> ModuleType:
    """The tool as a module, loaded by its path: in a checkout tools/ is not part of the package."""
    spec = importlib.util.spec_from_file_location(f"mocte_ds.tools.{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
