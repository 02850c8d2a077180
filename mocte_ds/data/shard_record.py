"""What a shard of prepared data says of itself, and whether several shards together are all of one corpus."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mocte_ds.data import signatures, units
from mocte_ds.data.grams import GRAM
from mocte_ds.data.stored_tokenizer import AnyTokenizer
from mocte_ds.data.units import Corpus, SourceFile, Unit, hashes_of_domains
from mocte_ds.errors import DataError
from mocte_ds.json_files import parse_json, read_text

RECORD = "shard.json"
FORMAT = 1
_MOST_BYTES = 1 << 30  # some millions of files


def settings_of(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What must be the same for all shards of a corpus, and whenever a shard goes on."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "words": GRAM,
        "hashes": signatures.MAX_HASHES,
        "piece_bytes": units.PIECE_BYTES,
        "whole_bytes": units.WHOLE_BYTES,
    }


def piece_name(settings: dict[str, Any], hashes: Sequence[str], piece: int) -> str:
    """Name of a piece's file, made from all that the piece depends on: a file of that name need not be made again."""
    key = [sorted(settings.items()), list(hashes), piece]
    return f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"


@dataclass
class ShardRecord:
    """What one shard was made from and which pieces it made."""

    number: int
    """From 1."""
    of: int
    settings: dict[str, Any]
    """See :func:`settings_of`."""
    corpus: str
    """Folder on the host that made it, for messages."""
    files: list[list[Any]]
    """Domain, name and bytes of each file of the corpus."""
    hashes: dict[str, str] = field(default_factory=dict)
    """sha256 of the files that were read, by name."""
    pieces: dict[str, int] = field(default_factory=dict)
    """By the number of a unit that was read: how many pieces it has."""
    made: dict[str, dict[str, str]] = field(default_factory=dict)
    """By the number of a unit: files of the pieces that this shard made, by number; empty for one without text."""
    complete: bool = False

    @property
    def title(self) -> str:
        """For messages."""
        return f"shard {self.number}/{self.of}"

    def text(self) -> bytes:
        """Content of the file."""
        values = asdict(self)
        return (json.dumps({**values, "sha256": _checksum(values)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "ShardRecord | None":
        """The record in a folder; None where there is none.

        Raises:
            DataError: it is damaged, or of another version.
        """
        path = folder / RECORD
        if not path.exists():
            return None
        values = parse_json(read_text(path, _MOST_BYTES, DataError), str(path), DataError)
        try:
            stored = values.pop("sha256", None)
            if stored != _checksum(values):
                raise ValueError("it is not what its own hash was made of")
            record = cls(**values)
            if record.settings["format"] != FORMAT:
                raise ValueError(f"format {record.settings['format']}, this version reads {FORMAT}")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); make the shard again in a new folder.") from error
        return record

    def as_corpus(self) -> Corpus:
        """The files of the corpus, where the shard saw them."""
        return Corpus(Path(self.corpus), [SourceFile(*values) for values in self.files])


def read_shards(folders: Sequence[Path], tokenizer: AnyTokenizer) -> dict[Path, ShardRecord]:
    """Records of the shards of one corpus, in their order.

    Raises:
        DataError: names the first folder that is not a finished shard, is there twice, or was made with another
            setting, tokenizer or input than the others; or the shards that are missing.
    """
    found: dict[int, tuple[Path, ShardRecord]] = {}
    for folder in folders:
        record = ShardRecord.read(folder)
        if record is None:
            raise DataError(f"{folder} holds no {RECORD}; tools/prepare_data.py --shard makes it.")
        if not record.complete:
            raise DataError(f"{record.title} in {folder} is not finished; start it again, it goes on where it stopped.")
        if record.number in found:
            raise DataError(f"{record.title} is there twice: {found[record.number][0]} and {folder}; name one.")
        found[record.number] = (folder, record)
    shards = dict(found[number] for number in sorted(found))
    first, *others = shards.items()
    for other in others:
        _require_alike(first, other)
    _require_tokenizer(first, tokenizer)
    missing = [f"{number}/{first[1].of}" for number in range(1, first[1].of + 1) if number not in found]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise DataError(f"shards are missing: {shown}; name the folders of all {first[1].of}.")
    return shards


def sources_of(shards: dict[Path, ShardRecord]) -> dict[str, str]:
    """Hash of each domain of the corpus that shards were made from; a file that no shard has read counts as empty."""
    hashes = {name: digest for shard in shards.values() for name, digest in shard.hashes.items()}
    files = next(iter(shards.values())).as_corpus().files
    return hashes_of_domains(files, lambda name: hashes.get(name, ""))


def pieces_of(shards: dict[Path, ShardRecord], chosen: list[Unit]) -> Iterator[tuple[Unit, int, Path | None]]:
    """Every piece in the order of the corpus: its unit, its number, and its file (None: it has no text).

    Raises:
        DataError: a shard does not have what it must have.
    """
    folders = list(shards)
    for number, unit in enumerate(chosen):
        totals = {shard.pieces[str(number)] for shard in shards.values() if str(number) in shard.pieces}
        for piece in range(max(totals, default=1)):
            owner = piece % len(folders) if unit.owner is None else unit.owner
            record = shards[folders[owner]]
            name = record.made.get(str(number), {}).get(str(piece))
            if name is None or len(totals) != 1:
                raise DataError(
                    f"{record.title} in {folders[owner]} does not have piece {piece} of {unit.files[0].name}; make "
                    "the shard again in a new folder."
                )
            yield unit, piece, folders[owner] / name if name else None


def _require_alike(one: tuple[Path, ShardRecord], other: tuple[Path, ShardRecord]) -> None:
    (folder, first), (place, record) = one, other
    where = f"{record.title} in {place} does not belong to {first.title} in {folder}"
    if first.of != record.of:
        raise DataError(f"{where}: name shards of one division.")
    for key, value in first.settings.items():
        if record.settings.get(key) != value:
            raise DataError(
                f"{where}: {key} is {record.settings.get(key)!r} and {value!r}; make one of them again with the other "
                "one's version and tokenizer."
            )
    sizes, others = ({(d, n): size for d, n, size in made.files} for made in (first, record))
    for file in sorted(sizes.keys() | others.keys()):
        if sizes.get(file) != others.get(file):
            seen = [f"{made.get(file, 'no')} bytes" for made in (others, sizes)]
            raise DataError(f"{where}: {file[1]} had {seen[0]} and {seen[1]}; {_SAME}")
    for name, found in first.hashes.items():
        if record.hashes.get(name, found) != found:
            raise DataError(f"{where}: {name} was changed between the two; {_SAME}")


_SAME = "give all hosts the same corpus, and start the shards again: what was not changed is not made again."


def _require_tokenizer(one: tuple[Path, ShardRecord], tokenizer: AnyTokenizer) -> None:
    folder, record = one
    if record.settings["tokenizer"] != tokenizer.sha256:
        raise DataError(
            f"{record.title} in {folder} was made with another tokenizer (sha256 {record.settings['tokenizer'][:12]}) "
            f"than {tokenizer.path} (sha256 {tokenizer.sha256[:12]}); name the one that the shards were made with."
        )


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
