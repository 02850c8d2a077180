"""Turns a corpus into megatron-core's indexed data, a fixed train/validation split and a manifest of what was done."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mocte_ds.data.manifest import FORMAT, NAME, SPLITS, Manifest, open_indexed, prefix
from mocte_ds.data.merge import merge_shards
from mocte_ds.data.shard import TOOL, Made, Share, make_shard
from mocte_ds.data.shard_record import ShardRecord, read_shards, sources_of
from mocte_ds.data.stored_tokenizer import (
    AnyTokenizer,
    open_tokenizer,
    other_tokenizer,
    tokenizer_files,
    tokenizer_in,
)
from mocte_ds.data.units import Corpus, hash_of_file, hashes_of_domains
from mocte_ds.data.verify import chunk_hashes
from mocte_ds.errors import DataError
from mocte_ds.ownership import put, remove, require_apart, require_new_or_ours, require_ours
from mocte_ds.ownership.workshop import workshop

_LOCK = ".lock"
UNFINISHED = "unfinished"
"""Folder in the prepared data that holds its only shard until all is done."""


def prepare(
    corpus: str | Path,
    out: str | Path,
    tokenizer_path: str | Path,
    validation_share: float = 0.05,
    workers: int = 2,
    progress: bool = True,
) -> tuple[Manifest, bool]:
    """Tokenise a corpus, unless that was done before from the same files; what was interrupted goes on.

    Everything is written under temporary names first and the manifest last; other files in ``out`` are left alone, and
    so is a file of somebody else under one of our names: it is refused. A second process that prepares the same folder
    waits and then finds the work done.

    Args:
        corpus: folder of the corpus.
        out: folder for DOMAIN_train.bin/.idx, DOMAIN_validation.bin/.idx, the tokenizer and manifest.json.
        tokenizer_path: sentencepiece model, or a folder with a tokenizer.json.
        validation_share: share of documents that go to validation, at least one; chosen by the hash of their text, and
            near-duplicates stay together (:meth:`mocte_ds.data.split.Splitter.split`).
        workers: processes at most; a small corpus is tokenised by this process.
        progress: show a bar on a terminal.

    Returns:
        The manifest, and whether anything had to be made.

    Raises:
        DataError: a bad corpus or tokenizer, a domain with fewer than two documents, or ``out`` cannot be written.
        NotOurs: ``out`` overlaps with what is read, or holds files under our names that are not shown to be ours.
    """
    _require_share(validation_share)
    _require_workers(workers)
    out, tokenizer, found = Path(out), open_tokenizer(tokenizer_path), Corpus.look(corpus)
    require_apart(out, Path(corpus))
    with _told(out, workers):
        sources = hashes_of_domains(found.files, lambda name: hash_of_file(found.folder / name))
        shard = out / UNFINISHED
        old = _reusable(out, tokenizer, validation_share, sources)
        if old and not shard.exists():
            return old, False
        require_apart(out, tokenizer.path)
        _require_ours(out, tokenizer, sources)
        with _alone_in(out):
            require_new_or_ours(shard, TOOL)
            old = _reusable(out, tokenizer, validation_share, sources)  # by a process that was here before
            manifest = old
            if manifest is None:
                made = make_shard(found, shard, tokenizer, Share(), workers, progress)
                manifest = _merge({shard: made.record}, out, tokenizer, validation_share, progress)
            remove(shard)
        return manifest, not old


def prepare_shard(
    corpus: str | Path,
    out: str | Path,
    tokenizer_path: str | Path,
    share: Share,
    workers: int = 2,
    progress: bool = True,
) -> Made:
    """Tokenise a share of a corpus, on one of several hosts; :func:`merge` puts the shards together.

    Args:
        corpus: folder of the corpus, the same on all hosts.
        out: folder for this shard.
        tokenizer_path: as for :func:`prepare`, and so are ``workers``, ``progress`` and the errors.
        share: which shard of how many.
        workers: processes at most.
        progress: show a bar on a terminal.
    """
    _require_workers(workers)
    out, tokenizer, found = Path(out), open_tokenizer(tokenizer_path), Corpus.look(corpus)
    require_apart(out, Path(corpus), tokenizer.path)
    with _told(out, workers), _alone_in(out):
        return make_shard(found, out, tokenizer, share, workers, progress)


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    tokenizer_path: str | Path,
    validation_share: float = 0.05,
    progress: bool = True,
) -> tuple[Manifest, bool]:
    """Put all shards of a corpus together; the files are those that :func:`prepare` makes of it.

    Args:
        folders: of all shards, in any order.
        out: as for :func:`prepare`, and so are the other arguments and what is returned.
        tokenizer_path: the one that the shards were made with.
        validation_share: share of documents that go to validation.
        progress: show a bar on a terminal.

    Raises:
        DataError: shards are missing, damaged, there twice or not of one corpus (:func:`read_shards`); a domain cannot
            be split; or ``out`` cannot be written.
        NotOurs: see :func:`prepare`.
    """
    _require_share(validation_share)
    out, tokenizer = Path(out), open_tokenizer(tokenizer_path)
    shards = read_shards([Path(folder) for folder in folders], tokenizer)
    require_apart(out, *shards)
    sources = sources_of(shards)
    with _told(out, 1):
        if old := _reusable(out, tokenizer, validation_share, sources):
            return old, False
        require_apart(out, tokenizer.path)
        _require_ours(out, tokenizer, sources)
        with _alone_in(out):
            return _merge(shards, out, tokenizer, validation_share, progress), True


def _merge(
    shards: dict[Path, ShardRecord], out: Path, tokenizer: AnyTokenizer, share: float, progress: bool
) -> Manifest:
    with workshop(out) as pending:
        domains, duplicates = merge_shards(shards, pending, share, progress)
        manifest = Manifest(
            FORMAT,
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.eod_id,
            share,
            domains,
            duplicates,
            {name: chunk_hashes(pending / name) for name in _data_files(domains)},
        )
        manifest.write(pending / NAME)
        _install(pending, out, manifest, tokenizer)
    return manifest


def _require_share(share: float) -> None:
    if not 0.0 < share < 1.0:
        raise DataError(f"validation_share = {share} must lie between 0 and 1.")


def _require_workers(workers: int) -> None:
    if workers < 1:
        raise DataError(f"workers = {workers} must be 1 or more.")


@contextlib.contextmanager
def _told(out: Path, workers: int) -> Iterator[None]:
    """Errors of the machine as messages."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"could not write prepared data to {out}: {error.strerror or error}; make room or choose another place. "
            "What was prepared there before is complete, and what was begun goes on when you start again."
        ) from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that tokenised ended (out of memory?); take fewer workers than {workers}."
        ) from error


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
