"""Routing keys of the user's own in an export: their files go along, and need nothing of ours where they are loaded."""

import ast
import contextlib
import importlib
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block
from mocte_ds.moe.keys import BUILT_IN, KEYS, Key
from mocte_ds.remote_code import known_keys_mocte
from mocte_ds.shown import shown

_OURS, _BESIDE = "mocte_ds.moe.keys", "mocte_ds.remote_code."
_PACKAGES = {"torch", "numpy", "transformers"}
"""What is there wherever an export is loaded, beside the standard library."""
_INDEX = "user_keys_mocte"
"""Module of mocte_ds/remote_code that every export rewrites."""
_MODELING = "modeling_blocks_mocte"
"""The one with the class."""
_MAY = (
    f"The file of a key that is exported imports the standard library, {', '.join(sorted(_PACKAGES))} and "
    f"{_OURS} alone (docs/extending.md)."
)


@dataclass(frozen=True)
class UserKeys:
    """What of them lies beside the weights."""

    files: dict[str, str] = field(default_factory=dict)
    """Name of the file of each kind."""
    texts: dict[str, str] = field(default_factory=dict)
    """What each file holds."""
    names: dict[str, str] = field(default_factory=dict)
    """Name of the class of each kind."""

    @classmethod
    def of(cls, blocks: list[Block]) -> "UserKeys":
        """Those of the banks of some blocks.

        Raises:
            CheckpointError: a key cannot go along; says why, and what to change.
        """
        found, sources = cls(), dict[str, str]()
        for gate in (bank.gate for block in blocks for bank in block.banks):
            kind, key = gate.router.kind, gate.key
            if kind in BUILT_IN:
                continue
            _require_stored(kind, key)
            if kind in found.files:
                continue
            module, text = carried(kind, type(key))
            name = file = f"user_key_{re.sub(r'[^0-9A-Za-z]', '_', module.rpartition('.')[2])}_mocte.py"
            count = 1
            while sources.setdefault(file, module) != module:
                count += 1
                file = name.replace("_mocte.py", f"_{count}_mocte.py")
            found.files[kind], found.names[kind], found.texts[file] = file, type(key).__name__, text
        return found

    def write(self, folder: Path) -> None:
        """Put the files beside the weights, and the imports of them where the code that lies there looks."""
        if not self.files:
            return
        for file, text in self.texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        imports, calls = [], []
        for number, (kind, file) in enumerate(self.files.items()):
            imports.append(f"from .{file.removesuffix('.py')} import {self.names[kind]} as key_{number}")
            calls.append(f"KEYS.register({kind!r})(key_{number})")
        lines = ['"""The routing keys that blocks look up, those of the user among them."""', ""]
        lines += ["from .known_keys_mocte import KEYS", *imports, "", '__all__ = ["KEYS"]', "", *calls]
        (folder / f"{_INDEX}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with (folder / f"{_MODELING}.py").open("a", encoding="utf-8") as modeling:
            modeling.write("\n".join(["", "# transformers 5.0 copies what this file imports itself.", *imports]) + "\n")


def carried(kind: str, key: type[Key]) -> tuple[str, str]:
    """Module of a key, and the text of its file as it lies in an export.

    Raises:
        CheckpointError: it has no file of its own, or the file needs more than is there where an export is loaded.
    """
    refused, module = f"the routing key {kind!r} cannot be exported: ", sys.modules.get(key.__module__)
    path = getattr(module, "__file__", None)
    if module is None or path is None or key.__module__ in ("__main__", "__mp_main__"):
        raise CheckpointError(
            f"{refused}{key.__name__} is defined in the script that runs, or in a notebook. Put the class into a file "
            "of its own and import it from there; checkpoints are not concerned."
        )
    if getattr(module, key.__qualname__, None) is not key:
        raise CheckpointError(
            f"{refused}{key.__qualname__} of {path} is made within a function or class, or under another name. Define "
            "it at the top level of the file."
        )
    try:
        with tokenize.open(path) as file:
            source = file.read()
        if not file.encoding.startswith("utf-8"):
            raise ValueError(f"it is written in {file.encoding}, and exports are in UTF-8; save it in UTF-8.")
        return key.__module__, _without_us(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{refused}{path}: {error}") from error


def require_same(own: Any, folder: Path) -> None:
    """Refuse an export whose keys are not those that are registered here: these would route another way.

    Args:
        own: file of each kind, as the config of the export has it; None: there are none.
        folder: the export.

    Raises:
        CheckpointError: another file, one that cannot be read, or a damaged config.
        ConfigError: no key of that name is registered.
    """
    if not isinstance(own or {}, dict):
        raise CheckpointError(f"{folder / 'config.json'}: user_keys are damaged: {shown(own)}.")
    for kind, name in (own or {}).items():
        text = carried(kind, KEYS.get(kind, f"{folder / 'config.json'}: kind"))[1]
        try:
            there = (folder / Path(str(name)).name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder}: {shown(name)} cannot be read: {error}.") from error
        if there != text:
            raise CheckpointError(
                f"{folder / name} is not the file of the key {kind!r} that is registered here; register the one that "
                "the model was trained with, or export it again."
            )


@contextlib.contextmanager
def class_beside(folder: Path) -> Iterator[Any]:
    """Within it the class of an export as the code beside the weights defines it; that code runs."""
    name, kept = f"mocte_export_{abs(hash(folder.resolve()))}", sys.dont_write_bytecode
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name], sys.dont_write_bytecode = package, True
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(f"{name}.{_MODELING}").MocteBlocksForCausalLM
    finally:
        sys.dont_write_bytecode = kept
        for module in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
            del sys.modules[module]


def _without_us(source: str) -> str:
    """A file in which imports from this package are those of the files beside the weights.

    Raises:
        ValueError: it needs anything else that may not be there.
    """
    text = source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    changes = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                _require_there(name.name, f"import {name.name}", node)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            beside = _beside(module, [name.name for name in node.names])
            if beside is None:
                _require_there(module, f"from {module} import ...", node)
                continue
            at = starts[node.lineno - 1] + node.col_offset
            words = re.compile(rb"from[\s\\]+" + re.escape(module.encode()) + rb"[\s\\]+import").match(text, at)
            if words is None:
                raise ValueError(f"line {node.lineno}: write `from {module} import ...` in the usual way.")
            changes.append((at, words.end(), f"from .{beside} import".encode()))
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    return text.decode()


def _beside(module: str, names: list[str]) -> str | None:
    """The module beside the weights that stands for one of ours; None: there is none."""
    if module == _OURS and set(names) <= set(known_keys_mocte.__all__):
        return known_keys_mocte.__name__.removeprefix(_BESIDE)
    return module.removeprefix(_BESIDE) if module.startswith(_BESIDE) else None


def _require_there(module: str, words: str, node: ast.stmt) -> None:
    top = module.partition(".")[0]
    if top not in sys.stdlib_module_names and top not in _PACKAGES:
        raise ValueError(f"line {node.lineno}: `{words}` does not go along. {_MAY}")


def _require_stored(kind: str, key: Key) -> None:
    """Refuse a key that keeps tensors in another way than as buffers of fp32 or integers: they would be lost."""
    refused = f"the routing key {kind!r} cannot be exported: "
    for path, part in key.named_modules():
        before = f"{path}." if path else ""
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                raise CheckpointError(f"{refused}{before}{name} is a tensor and no buffer; use register_buffer.")
        for name in part._non_persistent_buffers_set:
            raise CheckpointError(f"{refused}its buffer {before}{name} is not persistent, and so in no file.")
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype is not torch.float32:
                raise CheckpointError(
                    f"{refused}its buffer {before}{name} is {buffer.dtype}; exports keep fp32 and integers."
                )
