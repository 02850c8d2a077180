"""Folders import each other in one direction: what lies below never reads what lies above."""

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mocte_ds

PACKAGE = Path(__file__).parent.parent / "mocte_ds"
LATE = {("registry", "moe"), ("registry", "trainability")}
"""Imports by name at the first look-up: the items of a registry stand above the config that names them."""
RIDDLES = {"own", "whole", "plain", "pieces", "outline", "written"}
"""Words that name no content, in names of files and classes."""


def room(module: str) -> str:
    """The folder, or the file where there is none, that a module belongs to; two steps down in convert/."""
    parts = module.split(".")
    return ".".join(parts[1 : 3 if parts[1:2] == ["convert"] else 2])


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Modules of this package that a file imports, also inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mocte_ds")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
        elif isinstance(node, ast.ImportFrom) and node.module == "mocte_ds":
            yield from (f"mocte_ds.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mocte_ds":
            yield node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mocte_ds."):
            if (PACKAGE.parent / f"{node.value.replace('.', '/')}.py").is_file():
                yield node.value  # for importlib


@functools.cache
def imports() -> list[tuple[str, str]]:
    """Pairs of a module and one that it imports."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("mocte_ds", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        found += [(module, other) for other in imported(module, ast.parse(path.read_text(encoding="utf-8")))]
    return found


def edges() -> dict[str, dict[str, str]]:
    """For each room those that it imports, with one import as an example."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for module, other in imports():
        if room(other) != room(module) and (room(module), room(other)) not in LATE:
            found[room(module)][room(other)] = f"{module} imports {other}"
    return found


def cycle(graph: dict[str, dict[str, str]]) -> list[str]:
    """Imports that lead from a room back to it; empty where there are none."""
    done: set[str] = set()

    def follow(place: str, path: list[str]) -> list[str]:
        if place in path:
            ring = [*path[path.index(place) :], place]
            return [graph[a][b] for a, b in zip(ring, ring[1:], strict=False)]
        if place not in done:
            for other in graph.get(place, {}):
                if found := follow(other, [*path, place]):
                    return found
            done.add(place)
        return []

    return next((found for place in sorted(graph) if (found := follow(place, []))), [])


def test_no_two_folders_import_each_other() -> None:
    graph = edges()
    assert "moe" in graph["zero"] and "controller" in graph["engine"], "imports are not found"
    assert not (found := cycle(graph)), "\n".join(found)


def test_what_is_imported_is_there() -> None:
    """Also inside of functions, which nothing else looks at before they run."""
    for module, other in imports():
        path = PACKAGE.parent / other.replace(".", "/")
        name = other.removeprefix("mocte_ds.")
        there = path.is_dir() or path.with_suffix(".py").is_file() or name in mocte_ds.__all__ or other == "mocte_ds"
        assert there, f"{module} imports {other}"


def test_names_of_files_say_what_they_hold() -> None:
    folders = (PACKAGE, *(PACKAGE.parent / name for name in ("examples", "launch", "tools")))
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    assert not [path for path in files if RIDDLES & set(re.split(r"[_.]", path.name))]


def test_names_of_classes_say_what_they_hold() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if RIDDLES & {part.lower() for part in re.findall("[A-Z][a-z]*", name)}]


def test_a_cycle_is_seen() -> None:
    graph = edges()
    assert cycle({**graph, "config": {**graph["config"], "zero": "config imports zero"}})
