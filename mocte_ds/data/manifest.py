"""What a folder of prepared data holds and what it was made from; checked whenever the data is opened."""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocte_ds.data.stored_tokenizer import AnyTokenizer, open_tokenizer
from mocte_ds.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

FORMAT = 1
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
    """By domain: "source_sha256", and for "train" and "validation" the numbers of "documents" and "tokens"."""

    @property
    def sha256(self) -> str:
        """Hash of everything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Store as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a folder of prepared data.

        Raises:
            DataError: there is none, or it is damaged or of another format.
        """
        path = Path(folder) / NAME
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            for facts in manifest.domains.values():
                _ = facts["source_sha256"], [facts[s][key] for s in SPLITS for key in ("documents", "tokens")]
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no prepared data (no {NAME}); tools/prepare_data.py makes it.") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); prepare the data again.") from error
        if manifest.format != FORMAT:
            raise DataError(
                f"{path} has format {manifest.format}, this version reads {FORMAT}; prepare the data again."
            )
        return manifest

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


def open_indexed(folder: str | Path, manifest: Manifest, domain: str, split: str) -> "IndexedDataset":
    """Open one memory-mapped data set and compare its size with the manifest's.

    Raises:
        DataError: files are missing, cut off or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of missing GPU libraries
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    path, facts = prefix(folder, domain, split), manifest.domains[domain][split]
    try:
        size, index_size = (Path(f"{path}{end}").stat().st_size for end in (".bin", ".idx"))
        # 34 bytes in front, then length, place and end of every document in 4 + 8 + 8 bytes, and the first start in 8.
        expected = 34 + 20 * facts["documents"] + 8
        if index_size != expected:
            raise DataError(f"{path}.idx has {index_size} bytes instead of {expected}; prepare the data again.")
        data = IndexedDataset(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing; prepare the data again.") from error
    except DataError:
        raise
    except Exception as error:  # numpy, struct and assertions of megatron-core
        raise DataError(f"{path}.idx cannot be read ({error}); prepare the data again.") from error
    tokens = int(data.sequence_lengths.sum(dtype="int64"))
    if len(data) != facts["documents"] or tokens != facts["tokens"] or size != tokens * data.index.dtype_size:
        raise DataError(
            f"{path}.bin and .idx hold {len(data)} documents, {tokens} tokens and {size} bytes, {NAME} tells of "
            f"{facts['documents']} documents and {facts['tokens']} tokens; prepare the data again."
        )
    return data
