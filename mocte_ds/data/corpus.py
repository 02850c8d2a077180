"""A corpus is a folder with one file a domain: DOMAIN.jsonl[.gz], .parquet or .txt; every document is a text."""

import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mocte_ds.errors import DataError

_BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def embedded_corpus() -> Path:
    """The corpus that ships with the package: nine domains, 5 MB of text (NOTICE names sources and licences)."""
    return Path(__file__).parents[1] / "corpus"


def corpus_files(folder: str | Path) -> dict[str, Path]:
    """Files of a corpus by domain, in alphabetical order.

    Raises:
        DataError: no such folder, no usable file in it, or two files of one domain.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; a corpus is a folder with DOMAIN.jsonl[.gz], .parquet or .txt files.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in sorted(_BUILDERS, key=len, reverse=True) if path.name.endswith(s)), None)
        if suffix is None:
            continue
        domain = path.name.removesuffix(suffix)
        if domain in found:
            raise DataError(f"{folder} has two files of the domain '{domain}': {found[domain].name} and {path.name}.")
        found[domain] = path
    if not found:
        raise DataError(f"{folder} holds no DOMAIN.jsonl[.gz], .parquet or .txt file.")
    return found


def read_corpus(folder: str | Path) -> dict[str, list[str]]:
    """Texts of every domain, without empty ones.

    Args:
        folder: the corpus. A .txt file is split into documents at blank lines.

    Raises:
        DataError: an unreadable or empty file, text that is not UTF-8, or an entry without "text"; names file and line.
    """
    return {domain: read_documents(path) for domain, path in corpus_files(folder).items()}


def read_documents(path: Path) -> list[str]:
    """Texts of one file, through the `datasets` library; see :func:`read_corpus`."""
    import datasets

    datasets.disable_progress_bars()
    builder = next(b for suffix, b in _BUILDERS.items() if path.name.endswith(suffix))
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    if builder == "json":
        _require_valid_lines(path)
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(
                builder, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
            if "text" not in table.column_names:
                raise DataError(f'{path}: no column "text"; it has {table.column_names}.')
            texts = [text for text in table["text"] if text and text.strip()]
    except DataError:
        raise
    except Exception as error:  # the library raises many types
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if not texts:
        raise DataError(f"{path} holds no document with text; remove the file or fill it.")
    return texts


def _require_valid_lines(path: Path) -> None:
    """Find what the library would only report without its line."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; remove the file or fill it.")
    count = 0
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}).") from error
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON: {error}.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            keys = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(f'{path}, line {number}: no text under "text" (found: {keys}).')
        count += 1
    if not count:
        raise DataError(f"{path} holds no document; remove the file or fill it.")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
