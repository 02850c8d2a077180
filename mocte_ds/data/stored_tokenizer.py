"""Whichever tokenizer data was prepared with: a sentencepiece model, or the files of a Hugging Face folder."""

import os
from collections.abc import Iterable
from pathlib import Path

from mocte_ds.data.hf_tokenizer import MAIN_FILE, HFTokenizer
from mocte_ds.data.tokenizer import Tokenizer
from mocte_ds.ownership import put

AnyTokenizer = Tokenizer | HFTokenizer
_FILE, FOLDER = "tokenizer.model", "tokenizer"


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """Load a tokenizer.

    Args:
        path: a sentencepiece model; or a folder with a tokenizer.json, or that file.

    Raises:
        DataError: it is neither.
    """
    path = Path(path)
    if path.is_dir():
        return HFTokenizer(path)
    return HFTokenizer(path.parent) if path.name == MAIN_FILE else Tokenizer(path)


def tokenizer_in(folder: Path) -> Path:
    """Where the tokenizer of prepared data, of a run or of an imported model lies: `tokenizer` or `tokenizer.model`."""
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder / _FILE


def keep_tokenizer(tokenizer: AnyTokenizer, folder: Path, by: str = "pretrain") -> None:
    """Copy a tokenizer's files into a folder, in the place of another one that the same tool put there.

    Args:
        tokenizer: whose files are copied.
        folder: to write to.
        by: the tool.

    Raises:
        NotOurs: files of somebody else are in the way.
        OSError: they cannot be written.
    """
    files = tokenizer_files(tokenizer)
    put(folder, {name: path.read_bytes() for name, path in files.items()}, by, drop=other_tokenizer(folder, files))


def tokenizer_files(tokenizer: AnyTokenizer) -> dict[str, Path]:
    """A tokenizer's files by the names that they get beside data or a run."""
    if isinstance(tokenizer, Tokenizer):
        return {_FILE: tokenizer.path}
    return {f"{FOLDER}/{path.name}": path for path in tokenizer.files()}


def other_tokenizer(folder: Path, files: Iterable[str]) -> list[str]:
    """Names of a tokenizer's files that lie in a folder beside those which are wanted: they would be taken for them."""
    there = [path for path in (folder / _FILE, *sorted((folder / FOLDER).rglob("*"))) if os.path.lexists(path)]
    names = [path.relative_to(folder).as_posix() for path in there if path.is_symlink() or not path.is_dir()]
    return [name for name in names if name not in set(files)]
