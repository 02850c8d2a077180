"""Turns a corpus into megatron-core's indexed data, a fixed train/validation split and a manifest of what was done."""

import hashlib
import json
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mocte_ds.data.corpus import corpus_files, read_documents
from mocte_ds.data.tokenizer import Tokenizer
from mocte_ds.errors import DataError

FORMAT = 1
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

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a folder of prepared data.

        Raises:
            DataError: there is none, or it is damaged or of another format.
        """
        path = Path(folder) / "manifest.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            manifest = cls(**values)
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no prepared data (no manifest.json); tools/prepare_data.py makes it.") from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); prepare the data again.") from error
        if manifest.format != FORMAT:
            raise DataError(f"{path} has format {manifest.format}, this version reads {FORMAT}; prepare the data again.")
        return manifest


def prefix(folder: str | Path, domain: str, split: str) -> Path:
    """Path of an indexed data set without .bin and .idx."""
    return Path(folder) / f"{domain}_{split}"


def prepare(
    corpus: str | Path,
    out: str | Path,
    tokenizer_path: str | Path,
    validation_share: float = 0.05,
    workers: int = 2,
    progress: bool = True,
) -> tuple[Manifest, bool]:
    """Tokenise a corpus, unless that was done before from the same files.

    Args:
        corpus: folder of the corpus.
        out: folder for DOMAIN_train.bin/.idx, DOMAIN_validation.bin/.idx, tokenizer.model and manifest.json.
        tokenizer_path: sentencepiece model.
        validation_share: share of documents, chosen by the hash of their text, that go to validation; at least one.
        workers: processes.
        progress: show a bar.

    Returns:
        The manifest, and whether anything had to be made.

    Raises:
        DataError: see :func:`mocte_ds.data.read_corpus`; also a full disk, or a domain with fewer than two documents.
    """
    if not 0.0 < validation_share < 1.0:
        raise DataError(f"validation_share = {validation_share} must lie between 0 and 1.")
    out, tokenizer, files = Path(out), Tokenizer(tokenizer_path), corpus_files(corpus)
    sources = {domain: _file_hash(path) for domain, path in files.items()}
    old = _reusable(out, tokenizer, validation_share, sources)
    if old:
        return old, False
    pending = out.with_name(out.name + ".tmp")
    shutil.rmtree(pending, ignore_errors=True)
    try:
        pending.mkdir(parents=True)
        domains = {}
        with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (str(tokenizer_path),)) as pool:
            bar = tqdm(files.items(), desc="tokenising", unit="domain", disable=not progress)
            for domain, path in bar:
                bar.set_postfix_str(domain)
                counts = _write_domain(pending, domain, path, tokenizer, validation_share, pool.imap)
                domains[domain] = {"source_sha256": sources[domain], **counts}
        shutil.copyfile(tokenizer_path, pending / "tokenizer.model")
        manifest = Manifest(
            FORMAT, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id, validation_share, domains
        )
        (pending / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(pending, out)
    except OSError as error:
        shutil.rmtree(pending, ignore_errors=True)
        raise DataError(f"could not write prepared data to {out}: {error}. What was there before is untouched.") from error
    return manifest, True


def _write_domain(
    folder: Path, domain: str, path: Path, tokenizer: Tokenizer, share: float, imap: Callable
) -> dict[str, dict[str, int]]:
    """Tokenise one file into its two indexed data sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of missing GPU libraries
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    texts = read_documents(path)
    if len(texts) < 2:
        raise DataError(f"{path}: one document cannot be split into training and validation; split it or add more.")
    validation = _validation_documents(texts, share)
    dtype = np.uint16 if tokenizer.vocab_size < 65500 else np.int32
    builders = {split: IndexedDatasetBuilder(f"{prefix(folder, domain, split)}.bin", dtype=dtype) for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    for number, ids in enumerate(imap(_encode, texts, chunksize=64)):
        split = "validation" if number in validation else "train"
        ids.append(tokenizer.eod_id)
        builders[split].add_document(torch.tensor(ids), [len(ids)])
        counts[split]["documents"] += 1
        counts[split]["tokens"] += len(ids)
    for split, builder in builders.items():
        builder.finalize(f"{prefix(folder, domain, split)}.idx")
    return counts


def _validation_documents(texts: list[str], share: float) -> set[int]:
    """Numbers of the documents with the smallest text hashes below the share; at least one, never all.

    The choice hangs on the text alone, so a document stays on its side when others come or go. The hash is salted:
    corpora are often thinned out by a plain hash of the text, and then all their hashes are small.
    """
    salted = [hashlib.sha256(b"mocte-ds validation\0" + text.encode("utf-8", "replace")) for text in texts]
    places = [int.from_bytes(digest.digest()[:8]) / 2**64 for digest in salted]
    chosen = {number for number, place in enumerate(places) if place < share}
    if not chosen:
        chosen = {min(range(len(texts)), key=places.__getitem__)}
    if len(chosen) == len(texts):
        chosen.discard(max(range(len(texts)), key=places.__getitem__))
    return chosen


def _reusable(out: Path, tokenizer: Tokenizer, share: float, sources: dict[str, str]) -> Manifest | None:
    try:
        old = Manifest.read(out)
    except DataError:
        return None
    same = old.tokenizer_sha256 == tokenizer.sha256 and old.validation_share == share
    same = same and {d: facts["source_sha256"] for d, facts in old.domains.items()} == sources
    whole = all(
        Path(f"{prefix(out, domain, split)}{end}").is_file() for domain in sources for split in SPLITS for end in (".bin", ".idx")
    )
    return old if same and whole else None


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_worker: Tokenizer


def _start_worker(path: str) -> None:
    global _worker
    _worker = Tokenizer(path)


def _encode(text: str) -> list[int]:
    return _worker.encode(text)
