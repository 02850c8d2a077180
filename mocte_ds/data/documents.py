"""The documents of one file: JSON lines, plain text cut at blank lines, or a parquet table."""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mocte_ds.data.lines import MAX_BYTES, TooLong, numbered_lines
from mocte_ds.errors import DataError
from mocte_ds.json_files import parse_json
from mocte_ds.shown import one_line

# Few: each may be as long as a document may be.
_PARQUET_ROWS = 16
_KINDS = (".jsonl", ".json", ".ndjson", ".txt", ".parquet")
_COMPRESSED = (".gz", ".zst")
FORMATS = ".jsonl, .json (JSON lines) or .txt, plain or as .gz or .zst, or .parquet"


def file_suffix(name: str) -> str:
    """The part of a file's name that says how it is read, in lower case; empty for another format."""
    lower = name.lower()
    packed = next((end for end in _COMPRESSED if lower.endswith(end)), "")
    kind = next((end for end in _KINDS if lower.removesuffix(packed).endswith(end)), "")
    return "" if not kind or (packed and kind == ".parquet") else kind + packed


class DocumentFile:
    """Texts of one file, in order; those of nothing but white space are left out.

    Iterating raises DataError, with file and line, for a file that cannot be read, text that is not UTF-8, an entry
    without "text", and a document of more than 64 MiB: no more than one document is in memory.
    """

    def __init__(self, path: Path) -> None:
        """Keep the path; nothing is read yet."""
        self.path = path

    def __iter__(self) -> Iterator[str]:
        for _, text in self.chosen(lambda _size: True):
            if text is not None and text.strip():
                yield text

    def chosen(self, choose: Callable[[int], bool]) -> Iterator[tuple[int, str | None]]:
        """Size and text of every entry, also of those without text; what is not chosen is not parsed, but passed over.

        Args:
            choose: called with the size of each entry, in bytes, or in characters where it is known as text only.
        """
        import pyarrow

        try:
            if self.path.stat().st_size == 0:
                raise DataError(f"{self.path} is empty; fill it or remove it.")
            for size, text in self._read():
                yield size, text() if choose(size) else None
        except TooLong as error:
            raise DataError(
                f"{self.path}, line {error.line}: {error}; cut it into documents of at most {MAX_BYTES >> 20} MiB."
            ) from error
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path} cannot be read: {error}; is it complete?") from error

    def _read(self) -> Iterator[tuple[int, Callable[[], str]]]:
        suffix = file_suffix(self.path.name)
        if not suffix.startswith((".txt", ".parquet")):
            return ((len(line), partial(self._parsed, number, line)) for number, line in numbered_lines(self.path))
        return (
            (len(text), partial(str, text)) for text in (self._rows() if suffix == ".parquet" else self._paragraphs())
        )

    def _paragraphs(self) -> Iterator[str]:
        """Runs of lines between lines of nothing but white space."""
        lines: list[str] = []
        size = 0
        for number, raw in numbered_lines(self.path):
            line = self._decoded(number, raw)
            if line.strip():
                lines.append(line)
                size += len(line)
                if size > MAX_BYTES:
                    raise TooLong("text without a blank line", number)
            elif lines:
                yield "\n".join(lines)
                lines, size = [], 0
        yield "\n".join(lines)

    def _decoded(self, number: int, line: bytes) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line); store "
                "the file as UTF-8."
            ) from error

    def _parsed(self, number: int, raw: bytes) -> str:
        """The text of one JSON line; a blank line has none."""
        where, line = f"{self.path}, line {number}", self._decoded(number, raw)
        if not line.strip():
            return ""
        # json and not a reader of tables: those guess types (texts that look like dates become time stamps).
        try:
            entry = parse_json(line, "it", DataError, foreign=True)
        except DataError as error:
            raise DataError(
                f'{where}: no JSON ({error}); every line must be an object like {{"text": "..."}}.'
            ) from error
        if not isinstance(entry, dict):
            raise DataError(
                f'{where}: no object but {type(entry).__name__}; every line must be like {{"text": "..."}}.'
            )
        if not isinstance(entry.get("text"), str):
            found = f"text is {type(entry['text']).__name__}" if "text" in entry else f"keys: {_few(sorted(entry))}"
            raise DataError(f'{where}: no text under "text" ({found}).')
        try:
            entry["text"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair at character {error.start}; mend the text.") from error
        return entry["text"]

    def _rows(self) -> Iterator[str]:
        """Texts of a parquet table, some rows at a time."""
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(self.path, page_checksum_verification=True)
            self._require_text_column(file.schema_arrow)
            # A small file may hold a huge value many times; no value is larger than all that is stored.
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            columns = [group.column(place) for group in groups for place in range(group.num_columns)]
            stored = max((c.total_uncompressed_size for c in columns if c.path_in_schema == "text"), default=0)
            number, rows = 0, max(1, min(_PARQUET_ROWS, MAX_BYTES // max(1, stored)))
            with file:
                for batch in file.iter_batches(rows, columns=["text"]):
                    for value in batch.column(0):
                        number += 1
                        yield self._cell(value, number)
        except (pyarrow.ArrowMemoryError, MemoryError) as error:
            raise DataError(f"{self.path} needs more memory than there is: {one_line(error)}") from error
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} is not a parquet file, or damaged: {one_line(error)}") from error

    def _cell(self, value: Any, number: int) -> str:
        where = f"{self.path}, row {number}"
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise DataError(f'{where}: column "text" is not UTF-8; store it as UTF-8.') from error
        if text is None:
            raise DataError(f'{where}: no text under "text" (null).')
        if len(text) > MAX_BYTES:
            raise DataError(f"{where}: a text of more than {MAX_BYTES >> 20} MiB; cut it into several documents.")
        return text

    def _require_text_column(self, schema: Any) -> None:
        from pyarrow import types

        names = _few(schema.names)
        count = schema.names.count("text")
        if count == 0:
            raise DataError(f'{self.path}: no column "text" (found: {names}).')
        if count > 1:
            raise DataError(f'{self.path}: {count} columns are called "text" (found: {names}); rename all but one.')
        kind = schema.field("text").type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
            raise DataError(f'{self.path}: column "text" holds {kind}, not strings.')


def _few(names: list[str], count: int = 20, length: int = 60) -> str:
    """Some names of a list, each cut off where it is long: they are the file's."""
    shown = [name if len(name) <= length else f"{name[:length]}..." for name in names[:count]]
    return f"{shown}" if len(names) <= count else f"{shown} and {len(names) - count} more"
