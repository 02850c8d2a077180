"""What a folder of prepared data holds and what it was made from; checked whenever the data is opened."""

import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mocte_ds.data.stored_tokenizer import AnyTokenizer, open_tokenizer
from mocte_ds.data.verify import Amount, token_type, verify_file
from mocte_ds.errors import DataError
from mocte_ds.json_files import read_object

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

FORMAT = 2
NAME = "manifest.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Manifest:
    """What prepared data was made from, and how much there is of it."""

    format: int
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    validation_share: float
    domains: dict[str, dict[str, Any]]
    """By domain: "source_sha256", for "train" and "validation" the numbers of "documents" and "tokens", and what was
    found of "near_duplicates" (:class:`mocte_ds.data.split.Split`)."""
    near_duplicates: dict[str, Any] = field(default_factory=dict)
    """How they were searched for: "words" of a run in common, "kept_share" of the runs that were looked at."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Hashes of the chunks of each .bin and .idx (:mod:`mocte_ds.data.verify`)."""

    @property
    def sha256(self) -> str:
        """Hash of everything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Store as JSON, with the hash."""
        path.write_text(json.dumps({**asdict(self), "sha256": self.sha256}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a folder of prepared data.

        Raises:
            DataError: there is none, or it is damaged or of another format.
        """
        path = Path(folder) / NAME
        if not os.path.lexists(path):
            raise DataError(f"{folder} holds no prepared data (no {NAME}); tools/prepare_data.py makes it.")
        try:
            values = read_object(path, DataError)
            found = values["format"]
            if found == FORMAT:
                stored = values.pop("sha256")
                manifest = cls(**values)
                manifest._require_sound(stored)
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); prepare the data again.") from error
        if found != FORMAT:
            raise DataError(f"{path} has format {found!r}, this version reads {FORMAT}; prepare the data again.")
        return manifest

    def _require_sound(self, stored: str) -> None:
        """Raise ValueError, KeyError or TypeError for what this class would not have written."""
        if self.sha256 != stored:
            raise ValueError("it is not what its own hash was made of")
        numbers = [self.vocab_size, self.eod_id]
        for facts in self.domains.values():
            _ = facts["source_sha256"]
            numbers += [facts[split][key] for split in SPLITS for key in ("documents", "tokens")]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a number that is not 0 or more")
        if not all(isinstance(hashes, list) for hashes in self.files.values()):
            raise TypeError("hashes that are not lists")

    def require_tokenizer(self, path: str | Path) -> AnyTokenizer:
        """Load a tokenizer and make sure that the data was prepared with it.

        Raises:
            DataError: no tokenizer there, or another one.
        """
        tokenizer = open_tokenizer(path)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{path} ({tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}) is not the tokenizer that the "
                f"data was prepared with ({self.vocab_size} pieces, sha256 {self.tokenizer_sha256[:12]}); take the "
                "tokenizer beside the prepared data, or prepare the data again with this one."
            )
        return tokenizer


def prefix(folder: str | Path, domain: str, split: str) -> Path:
    """Path of an indexed data set without .bin and .idx."""
    return Path(folder) / f"{domain}_{split}"


def open_indexed(
    folder: str | Path, manifest: Manifest, domain: str, split: str, verify: Amount | None = "auto"
) -> "IndexedDataset":
    """Open one memory-mapped data set and compare it with the manifest.

    Args:
        folder: prepared data.
        manifest: of it.
        domain: its name.
        split: `train` or `validation`.
        verify: how much of the files is held against their hashes; None: nothing, since that was done already.

    Raises:
        DataError: files are missing, cut off or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of missing GPU libraries
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    path, facts = prefix(folder, domain, split), manifest.domains[domain][split]
    documents, tokens = facts["documents"], facts["tokens"]
    try:
        size, index_size = (Path(f"{path}{end}").stat().st_size for end in (".bin", ".idx"))
        # 34 bytes in front, then length, place and end of every document in 4 + 8 + 8 bytes, and the first start in 8.
        expected = 34 + 20 * documents + 8
        if index_size != expected:
            raise DataError(f"{path}.idx has {index_size} bytes instead of {expected}; prepare the data again.")
        width = np.dtype(token_type(manifest.vocab_size)).itemsize
        if size != tokens * width:
            raise DataError(
                f"{path}.bin holds {size // width} tokens and {size} bytes, {NAME} tells of {documents} documents and "
                f"{tokens} tokens of {width} bytes; prepare the data again."
            )
        if verify is not None:
            for end in (".bin", ".idx"):
                verify_file(Path(folder), manifest, f"{path.name}{end}", verify)
        data = IndexedDataset(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing; prepare the data again.") from error
    except DataError:
        raise
    except Exception as error:  # numpy, struct and assertions of megatron-core
        raise DataError(f"{path}.idx cannot be read ({error}); prepare the data again.") from error
    found = int(data.sequence_lengths.sum(dtype="int64"))
    if len(data) != documents or found != tokens or (len(data) and data.sequence_lengths.min() < 1):
        raise DataError(
            f"{path}.idx holds {len(data)} documents and {found} tokens, {NAME} tells of {documents} documents and "
            f"{tokens} tokens; prepare the data again."
        )
    return data
