"""Whichever tokenizer data was prepared with: a sentencepiece model, or the files of a Hugging Face folder."""

import shutil
from pathlib import Path

from mocte_ds.data.hf_tokenizer import MAIN_FILE, HFTokenizer
from mocte_ds.data.tokenizer import Tokenizer

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


def keep_tokenizer(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Copy a tokenizer's files into a folder, in the place of another one there.

    Raises:
        OSError: they cannot be written.
    """
    remove_tokenizer(folder)
    if isinstance(tokenizer, Tokenizer):
        shutil.copyfile(tokenizer.path, folder / _FILE)
        return
    (folder / FOLDER).mkdir()
    for path in tokenizer.files():
        shutil.copyfile(path, folder / FOLDER / path.name)


def remove_tokenizer(folder: Path) -> None:
    """Remove the tokenizer of a folder, if there is one."""
    (folder / _FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
