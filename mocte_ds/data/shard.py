"""Tokenises one share of a corpus into pieces; a piece that is there is not made again."""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mocte_ds.data.encode import Encoded, encoder
from mocte_ds.data.piece_file import Piece, read_arrays
from mocte_ds.data.shard_record import RECORD, ShardRecord, piece_name, settings_of
from mocte_ds.data.signatures import LEVELS, halvings_for
from mocte_ds.data.stored_tokenizer import AnyTokenizer
from mocte_ds.data.units import Corpus, Unit, UnitReader
from mocte_ds.errors import DataError
from mocte_ds.ownership import hash_file, put, require_ours
from mocte_ds.ownership.marker import Marker
from mocte_ds.ownership.workshop import workshop

TOOL = "prepare_data"
# A process costs seconds to start; it has to get at least so many bytes.
_BYTES_A_WORKER = 16_000_000
# Documents travel to the processes in parts of about so many characters.
_CHARACTERS_A_PART = 200_000


@dataclass(frozen=True)
class Share:
    """Which shard of how many."""

    number: int = 1
    """From 1."""
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From a command line: I/N.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        share = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise ValueError(f"{text!r} is not like 3/8: one of 1 to N, and N")
        return share


@dataclass
class Made:
    """What came of making a shard."""

    record: ShardRecord
    found: int = 0
    """Pieces that were there."""
    made: int = 0


def make_shard(
    corpus: Corpus, folder: Path, tokenizer: AnyTokenizer, share: Share, workers: int, progress: bool
) -> Made:
    """Make what is missing of a shard; its pieces lie in ``folder``, and shard.json comes last.

    Raises:
        DataError: a bad corpus, or ``folder`` holds another shard.
        NotOurs: files of somebody else lie under our names.
        OSError: it cannot be written.
    """
    files = [[file.domain, file.name, file.bytes] for file in corpus.files]
    settings = settings_of(tokenizer)
    record = ShardRecord(share.number, share.of, settings, str(corpus.folder.absolute()), files)
    require_ours(folder, [RECORD], TOOL)
    there = ShardRecord.read(folder)
    if there is None:
        put(folder, {RECORD: record.text()}, TOOL)
    elif (there.number, there.of) != (share.number, share.of):
        raise DataError(f"{folder} holds {there.title}, and not {record.title}; name a folder of its own for each.")
    worker = _Worker(corpus, folder, record)
    size = sum(file.bytes for unit, _ in worker.units() for file in unit.files)
    with (
        encoder(tokenizer, min(workers, 1 + size // _BYTES_A_WORKER)) as encode,
        tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for encoded in encode(worker.parts(bar)):
            worker.take(encoded)
    worker.store()
    worker.require_text()
    record.complete = True
    used = {name for names in record.made.values() for name in names.values()}
    marker = Marker.read(folder) or Marker()
    stale = [name for name in marker.files if name.endswith(".npz") and name not in used]
    put(folder, {RECORD: record.text()}, TOOL, drop=stale, withdraw=RECORD)
    return worker.made


@dataclass
class _Part:
    """Texts that were handed out and have not come back yet."""

    reader: UnitReader
    unit: str
    piece: int
    by_file: np.ndarray


@dataclass
class _Worker:
    corpus: Corpus
    folder: Path
    record: ShardRecord

    def __post_init__(self) -> None:
        self.made = Made(self.record)
        self._under_way: deque[_Part] = deque()
        self._open: list[tuple[_Part, Encoded]] = []  # of one piece
        self._levels = np.zeros(LEVELS, dtype=np.int64)
        self._by_file: dict[str, np.ndarray] = {}

    def units(self) -> Iterator[tuple[Unit, str]]:
        """Units of which this shard makes something, and their numbers."""
        for number, unit in enumerate(self.corpus.units(self.record.of)):
            if unit.owner in (None, self.record.number - 1):
                yield unit, str(number)

    def parts(self, bar: tqdm) -> Iterator[tuple[list[str], int]]:
        """Texts of the pieces that are missing."""
        for unit, number in self.units():
            reader = UnitReader(unit, self.corpus.folder)
            self.record.hashes |= dict(zip((file.name for file in unit.files), reader.hashes, strict=True))
            names = self.record.made[number] = {}
            self._by_file[number] = np.zeros(len(unit.files), dtype=np.int64)

            def wanted(piece: int, unit=unit, number=number, reader=reader) -> bool:
                if not unit.belongs_to(piece, self.record.number - 1, self.record.of):
                    return False
                return not self._is_there(number, piece, piece_name(self.record.settings, reader.hashes, piece))

            texts: list[str] = []
            size, part = 0, _Part(reader, number, 0, np.zeros(len(unit.files), dtype=np.int64))
            for piece, file, text in reader.texts(wanted):
                if texts and (piece != part.piece or size >= _CHARACTERS_A_PART):
                    self._under_way.append(part)
                    yield texts, halvings_for(self._levels)
                    texts, size = [], 0
                if not texts:
                    part = _Part(reader, number, piece, np.zeros(len(unit.files), dtype=np.int64))
                texts.append(text)
                size += len(text)
                part.by_file[file] += 1
            if texts:
                self._under_way.append(part)
                yield texts, halvings_for(self._levels)
            self.record.pieces[number] = reader.pieces
            for piece in range(reader.pieces):
                if unit.belongs_to(piece, self.record.number - 1, self.record.of):
                    names.setdefault(str(piece), "")
            bar.update(sum(file.bytes for file in unit.files))

    def take(self, encoded: Encoded) -> None:
        """What came back of the oldest texts under way."""
        part = self._under_way.popleft()
        if self._open and (part.unit, part.piece) != (self._open[0][0].unit, self._open[0][0].piece):
            self.store()
        self._open.append((part, encoded))

    def store(self) -> None:
        """Write the piece that is in memory."""
        if not self._open:
            return
        part = self._open[0][0]
        encoded = Encoded.joined([encoded for _, encoded in self._open], self.record.settings["vocab_size"])
        by_file = sum((part.by_file for part, _ in self._open), np.zeros_like(part.by_file))
        self._open = []
        self._levels += encoded.signatures.levels
        kept = encoded.signatures.kept(halvings_for(self._levels))
        name = piece_name(self.record.settings, part.reader.hashes, part.piece)
        with workshop(self.folder) as work:
            path = work / name
            Piece(Encoded(encoded.tokens, encoded.lengths, kept), by_file).write(path)
            # Its name says what it was made from, so that has to be true.
            part.reader.require_unchanged()
            put(self.folder, {name: path}, TOOL, known={name: hash_file(path)})
        self._note(part.unit, part.piece, name, by_file)
        self.made.made += 1

    def require_text(self) -> None:
        """Refuse files without any document, as far as this shard has seen all of them.

        Raises:
            DataError: names the first one.
        """
        for unit, number in self.units():
            if unit.owner is not None:
                require_text(self.corpus.folder, [file.name for file in unit.files], self._by_file[number])

    def _is_there(self, number: str, piece: int, name: str) -> bool:
        if not (self.folder / name).exists():
            return False
        require_ours(self.folder, [name], TOOL)  # and as we wrote it
        levels, by_file = read_arrays(self.folder / name, "levels", "by_file")
        self._levels += levels
        self._note(number, piece, name, by_file)
        self.made.found += 1
        return True

    def _note(self, number: str, piece: int, name: str, by_file: np.ndarray) -> None:
        self.record.made[number][str(piece)] = name
        self._by_file[number] += by_file


def require_text(folder: Path, names: list[str], documents: np.ndarray) -> None:
    """Refuse files without any document.

    Args:
        folder: of the corpus.
        names: of files in it.
        documents: of each.

    Raises:
        DataError: names the first one.
    """
    for name, count in zip(names, documents, strict=True):
        if not count:
            raise DataError(f"{folder / name} holds no document with text; fill it or remove it.")
