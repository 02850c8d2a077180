"""A corpus is a folder with one file a domain: DOMAIN.jsonl[.gz], .parquet or .txt; every document is a text."""

import glob
import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocte_ds.errors import DataError

_SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet", ".txt")


def embedded_corpus() -> Path:
    """The corpus that ships with the package: nine domains, 5 MB of text (NOTICE names sources and licences)."""
    return Path(__file__).parents[1] / "corpus"


def corpus_files(folder: str | Path) -> dict[str, Path]:
    """Files of a corpus by domain, in alphabetical order; names that begin with "." or "_" are left out.

    Raises:
        DataError: no such folder, no usable file in it, or two files of one domain.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; a corpus is a folder with DOMAIN.jsonl[.gz], .parquet or .txt files.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
        if suffix is None or path.name.startswith((".", "_")):
            continue
        domain = path.name.removesuffix(suffix)
        if domain in found:
            raise DataError(
                f"{folder} has two files of the domain '{domain}': {found[domain].name} and {path.name}; rename one."
            )
        found[domain] = path
    if not found:
        raise DataError(f"{folder} holds no DOMAIN.jsonl[.gz], .parquet or .txt file; put one file a domain there.")
    return found


def read_corpus(folder: str | Path) -> dict[str, "Documents"]:
    """Documents of every domain; a file is read when its documents are iterated over.

    Raises:
        DataError: see :func:`corpus_files`.
    """
    return {domain: Documents(path) for domain, path in corpus_files(folder).items()}


class Documents:
    """Texts of one file. Every iteration reads the file anew, so a corpus may be larger than the memory.

    Iterating raises DataError, with file and line, for an unreadable or empty file, text that is not UTF-8 and an entry
    without "text". Documents of nothing but white space are left out; a .txt file is cut at blank lines.
    """

    def __init__(self, path: str | Path) -> None:
        """Keep the path; nothing is read yet."""
        self.path = Path(path)

    def __iter__(self) -> Iterator[str]:
        """Texts in the order of the file."""
        empty = True
        for text in self._texts():
            if text.strip():
                empty = False
                yield text
        if empty:
            raise DataError(f"{self.path} holds no document with text; fill it or remove it.")

    def sha256(self) -> str:
        """Hash of the file as it lies on the disk."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def _texts(self) -> Iterator[str]:
        # These readers open local files only; load_dataset() asks a server first and may stall without a network.
        import pyarrow
        from datasets.io.parquet import ParquetDatasetReader
        from datasets.io.text import TextDatasetReader

        name = glob.escape(str(self.path))  # the library takes patterns
        with tempfile.TemporaryDirectory() as cache:
            options: dict[str, Any] = {"split": "train", "cache_dir": cache, "streaming": True}
            try:
                if self.path.stat().st_size == 0:
                    raise DataError(f"{self.path} is empty; fill it or remove it.")
                if self.path.suffix == ".parquet":
                    self._require_text_column()
                    for number, row in enumerate(
                        ParquetDatasetReader(name, columns=["text"], **options).read(), start=1
                    ):
                        if row["text"] is None:
                            raise DataError(f'{self.path}, row {number}: no text under "text" (null).')
                        yield row["text"]
                elif self.path.suffix == ".txt":
                    for row in TextDatasetReader(name, sample_by="paragraph", encoding="utf-8-sig", **options).read():
                        yield row["text"].strip("\n")
                else:
                    # The library's own JSON reader guesses types: texts that look like dates become time stamps, and
                    # other keys must have one type throughout. Hence JSON is parsed here, line by line.
                    lines = TextDatasetReader(name, sample_by="line", encoding="utf-8-sig", **options).read()
                    for number, row in enumerate(lines, start=1):
                        if row["text"].strip():
                            yield self._parsed(number, row["text"])
            except UnicodeDecodeError as error:
                raise DataError(f"{self._undecodable()}; store the file as UTF-8.") from error
            except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
                raise DataError(f"{self.path} cannot be read: {error}; is it complete?") from error

    def _parsed(self, number: int, line: str) -> str:
        """The text of one JSON line."""
        where = f"{self.path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f'{where}: no JSON ({error}); every line must be an object like {{"text": "..."}}.'
            ) from error
        if not isinstance(entry, dict):
            raise DataError(
                f'{where}: no object but {type(entry).__name__}; every line must be like {{"text": "..."}}.'
            )
        if not isinstance(entry.get("text"), str):
            found = f"text is {type(entry['text']).__name__}" if "text" in entry else f"keys: {sorted(entry)}"
            raise DataError(f'{where}: no text under "text" ({found}).')
        try:
            entry["text"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair at character {error.start}; mend the text.") from error
        return entry["text"]

    def _require_text_column(self) -> None:
        import pyarrow
        from pyarrow import parquet

        try:
            schema = parquet.read_schema(self.path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} is no parquet file: {str(error).splitlines()[0]}") from error
        if "text" not in schema.names:
            raise DataError(f'{self.path}: no column "text" (found: {schema.names}).')
        kind = schema.field("text").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f'{self.path}: column "text" holds {kind}, not strings.')

    def _undecodable(self) -> str:
        """Where the file stops being UTF-8."""
        if self.path.suffix == ".parquet":
            return f'{self.path}: column "text" is not UTF-8'
        with gzip.open(self.path) if self.path.suffix == ".gz" else open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    return f"{self.path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line)"
        return f"{self.path}: not UTF-8"
