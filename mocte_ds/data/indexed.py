"""Turns a corpus into megatron-core's indexed data, a fixed train/validation split and a manifest of what was done."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mocte_ds.data.corpus import Documents, read_corpus
from mocte_ds.data.manifest import FORMAT, NAME, SPLITS, Manifest, open_indexed, prefix
from mocte_ds.data.stored_tokenizer import (
    AnyTokenizer,
    open_tokenizer,
    other_tokenizer,
    tokenizer_files,
    tokenizer_in,
)
from mocte_ds.errors import DataError
from mocte_ds.ownership import put, require_apart, require_ours
from mocte_ds.ownership.workshop import workshop

TOOL = "prepare_data"
_LOCK = ".lock"

# A process costs seconds to start; it has to get at least so many characters.
_CHARACTERS_A_WORKER = 16_000_000
# Documents travel to the processes in parts of about so many characters.
_CHARACTERS_A_PART = 200_000

_Encoder = Callable[[Iterable[str]], Iterator[np.ndarray]]


def prepare(
    corpus: str | Path,
    out: str | Path,
    tokenizer_path: str | Path,
    validation_share: float = 0.05,
    workers: int = 2,
    progress: bool = True,
) -> tuple[Manifest, bool]:
    """Tokenise a corpus, unless that was done before from the same files.

    Everything is written under temporary names first and the manifest last; other files in ``out`` are left alone, and
    so is a file of somebody else under one of our names: it is refused. A second process that prepares the same folder
    waits and then finds the work done.

    Args:
        corpus: folder of the corpus.
        out: folder for DOMAIN_train.bin/.idx, DOMAIN_validation.bin/.idx, the tokenizer and manifest.json.
        tokenizer_path: sentencepiece model, or a folder with a tokenizer.json.
        validation_share: share of documents, chosen by the hash of their text, that go to validation; at least one.
        workers: processes at most; a small corpus is tokenised by this process.
        progress: show a bar on a terminal.

    Returns:
        The manifest, and whether anything had to be made.

    Raises:
        DataError: a bad corpus or tokenizer, a domain with fewer than two documents, or ``out`` cannot be written.
        NotOurs: ``out`` overlaps with what is read, or holds files under our names that are not shown to be ours.
    """
    if not 0.0 < validation_share < 1.0:
        raise DataError(f"validation_share = {validation_share} must lie between 0 and 1.")
    if workers < 1:
        raise DataError(f"workers = {workers} must be 1 or more.")
    out, tokenizer, documents = Path(out), open_tokenizer(tokenizer_path), read_corpus(corpus)
    require_apart(out, Path(corpus))
    sources = {domain: texts.sha256() for domain, texts in documents.items()}
    try:
        old = _reusable(out, tokenizer, validation_share, sources)
        if old:
            return old, False
        require_apart(out, tokenizer.path)
        _require_ours(out, tokenizer, documents)
        out.mkdir(parents=True, exist_ok=True)
        with _alone_in(out):
            old = _reusable(out, tokenizer, validation_share, sources)  # by a process that was here before
            if old:
                return old, False
            with workshop(out) as pending:
                counts = _build(pending, documents, tokenizer, validation_share, workers, progress)
                domains = {domain: {"source_sha256": sources[domain], **counts[domain]} for domain in documents}
                manifest = Manifest(
                    FORMAT, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id, validation_share, domains
                )
                manifest.write(pending / NAME)
                _install(pending, out, manifest, tokenizer)
    except OSError as error:
        raise DataError(
            f"could not write prepared data to {out}: {error.strerror or error}; make room or choose another place. "
            "What was prepared there before is complete."
        ) from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that tokenised ended (out of memory?); take fewer workers than {workers}."
        ) from error
    return manifest, True


@dataclass(frozen=True)
class _Plan:
    """What a first pass over one domain found."""

    documents: int
    characters: int
    threshold: int
    """Documents whose :func:`_place` is smaller go to validation."""


def _build(
    folder: Path, corpus: dict[str, Documents], tokenizer: AnyTokenizer, share: float, workers: int, progress: bool
) -> dict[str, dict[str, dict[str, int]]]:
    """Write the data sets of all domains; numbers of documents and tokens by domain and split."""
    silent = None if progress else True  # None: no bar where there is no terminal
    reading = tqdm(corpus.items(), desc="reading", unit="domain", disable=silent)
    plans = {domain: _plan(texts, share) for domain, texts in reading}
    characters = sum(plan.characters for plan in plans.values())
    workers = min(workers, 1 + characters // _CHARACTERS_A_WORKER)
    total = sum(plan.documents for plan in plans.values())
    with (
        _encoder(tokenizer, workers) as encode,
        tqdm(total=total, desc="tokenising", unit="document", disable=silent) as bar,
    ):
        return {
            domain: _write_domain(folder, domain, texts, plans[domain].threshold, tokenizer, encode, bar)
            for domain, texts in corpus.items()
        }


def _plan(texts: Documents, share: float) -> _Plan:
    """Count, and choose a threshold near the share that leaves no split empty.

    The choice hangs on the text alone, so a document (and every copy of it) stays on its side when others come or go.
    """
    count = characters = 0
    smallest, largest, threshold = 2**64, -1, int(share * 2**64)
    for text in texts:
        place = _place(text)
        smallest, largest = min(smallest, place), max(largest, place)
        count, characters = count + 1, characters + len(text)
    if smallest == largest:
        raise DataError(
            f"{texts.path}: one document (or copies of one) cannot be split into training and validation; cut it into "
            "several documents or add more."
        )
    return _Plan(count, characters, min(max(threshold, smallest + 1), largest))


def _place(text: str) -> int:
    """A number in [0, 2^64) from the text. Salted: corpora are often thinned out by a plain hash of the text."""
    return int.from_bytes(hashlib.sha256(b"mocte-ds validation\0" + text.encode("utf-8")).digest()[:8])


def _write_domain(
    folder: Path, domain: str, texts: Documents, threshold: int, tokenizer: AnyTokenizer, encode: _Encoder, bar: tqdm
) -> dict[str, dict[str, int]]:
    """Tokenise one file into its two indexed data sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of missing GPU libraries
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    builders = {split: IndexedDatasetBuilder(f"{prefix(folder, domain, split)}.bin", dtype=dtype) for split in SPLITS}
    sides: deque[str] = deque()  # of the documents that are under way

    def sorted_out() -> Iterator[str]:
        for text in texts:
            sides.append("validation" if _place(text) < threshold else "train")
            yield text

    try:
        for ids in encode(sorted_out()):
            split = sides.popleft()
            builders[split].add_document(torch.from_numpy(ids), [len(ids)])
            counts[split]["documents"] += 1
            counts[split]["tokens"] += len(ids)
            bar.update()
        for split, builder in builders.items():
            builder.finalize(f"{prefix(folder, domain, split)}.idx")
    except OSError:
        for builder in builders.values():
            with contextlib.suppress(OSError):  # closing writes the rest, which fails again
                builder.data_file.close()
        raise
    return counts


@contextlib.contextmanager
def _encoder(tokenizer: AnyTokenizer, workers: int) -> Iterator[_Encoder]:
    """A function from texts to token ids with eod, in order; by other processes where there are several."""
    if workers == 1:
        yield lambda texts: (_ids(tokenizer, text) for text in texts)
        return
    context = multiprocessing.get_context("spawn")  # fork and the threads of PyTorch do not go together
    with ProcessPoolExecutor(workers, context, _start_worker, (str(tokenizer.path),)) as pool:

        def encode(texts: Iterable[str]) -> Iterator[np.ndarray]:
            waiting: deque[Future[list[np.ndarray]]] = deque()
            for part in _parts(texts):
                waiting.append(pool.submit(_encode_part, part))
                if len(waiting) > 3 * workers:  # enough to keep all busy, little enough for the memory
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

        yield encode


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= _CHARACTERS_A_PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _ids(tokenizer: AnyTokenizer, text: str) -> np.ndarray:
    """Token ids of a document and its end: (n + 1,) int32."""
    return np.asarray([*tokenizer.encode(text), tokenizer.eod_id], dtype=np.int32)


_worker: AnyTokenizer


def _start_worker(path: str) -> None:
    global _worker
    _worker = open_tokenizer(path)


def _encode_part(texts: list[str]) -> list[np.ndarray]:
    return [_ids(_worker, text) for text in texts]


def _require_ours(out: Path, tokenizer: AnyTokenizer, domains: Iterable[str]) -> None:
    """Refuse files of somebody else under the names that will be written, before hours of work."""
    wanted = [*tokenizer_files(tokenizer), NAME, *_data_files(domains)]
    require_ours(out, [*wanted, *other_tokenizer(out, wanted)], TOOL)


def _data_files(domains: Iterable[str]) -> list[str]:
    return [f"{prefix('', domain, split)}{end}" for domain in domains for split in SPLITS for end in (".bin", ".idx")]


def _install(pending: Path, out: Path, manifest: Manifest, tokenizer: AnyTokenizer) -> None:
    """Move finished files into place. A folder without a manifest counts as empty, so it goes first and comes last."""
    stale: set[str] = set()
    with contextlib.suppress(DataError):
        stale = set(Manifest.read(out).domains) - set(manifest.domains)
    kept = pending / "tokenizer"
    kept.mkdir()
    files = {name: pending / name for name in _data_files(manifest.domains)}
    for name, path in tokenizer_files(tokenizer).items():
        files[name] = kept / path.name
        shutil.copyfile(path, files[name])
    files[NAME] = pending / NAME
    drop = [*_data_files(sorted(stale)), *other_tokenizer(out, files)]
    put(out, files, TOOL, drop=drop, withdraw=NAME)


def _reusable(out: Path, tokenizer: AnyTokenizer, share: float, sources: dict[str, str]) -> Manifest | None:
    """The manifest that is there, if it tells of the same input and its files are complete."""
    try:
        old = Manifest.read(out)
        old.require_tokenizer(tokenizer_in(out))
        if old.tokenizer_sha256 != tokenizer.sha256 or old.validation_share != share:
            return None
        if {domain: facts["source_sha256"] for domain, facts in old.domains.items()} != sources:
            return None
        for domain in sources:
            for split in SPLITS:
                open_indexed(out, old, domain, split)
    except DataError:
        return None
    return old


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares this folder."""
    if not (folder / _LOCK).exists():
        put(folder, {_LOCK: b""}, TOOL)
    with open(folder / _LOCK, "rb") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
