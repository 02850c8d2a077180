"""Puts the shards of a corpus together: finds near-duplicates over all of them, splits, and writes the data sets."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mocte_ds.data.manifest import SPLITS, prefix
from mocte_ds.data.piece_file import read_arrays, read_signatures
from mocte_ds.data.shard import require_text
from mocte_ds.data.shard_record import ShardRecord, pieces_of, sources_of
from mocte_ds.data.signatures import LEVELS, halvings_for
from mocte_ds.data.split import Split, Splitter
from mocte_ds.data.token_file import TokenFile
from mocte_ds.data.units import Unit

_Pieces = list[tuple[Unit, Path | None]]


def merge_shards(
    shards: dict[Path, ShardRecord], out: Path, share: float, progress: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Write the data sets of all domains.

    Args:
        shards: from :func:`mocte_ds.data.shard_record.read_shards`.
        out: folder for them.
        share: of the documents for validation.
        progress: show a bar on a terminal.

    Returns:
        By domain its hash, the numbers of documents and tokens of each split and its near-duplicates; and how those
        were found.

    Raises:
        DataError: a piece is missing or damaged, a file holds no text, or a domain cannot be split.
        OSError: ``out`` cannot be written.
    """
    record = next(iter(shards.values()))
    corpus = record.as_corpus()
    domains: dict[str, _Pieces] = {file.domain: [] for file in corpus.files}
    for unit, _, path in pieces_of(shards, corpus.units(record.of)):
        domains[unit.files[0].domain].append((unit, path))
    split = _split(domains, corpus.folder, share)
    total = sum(len(pieces) for pieces in domains.values())
    facts, sources = {}, sources_of(shards)
    with tqdm(total=total, desc="writing", unit="piece", disable=None if progress else True) as bar:
        for domain, pieces in domains.items():
            counts = _write(out, domain, pieces, split.held_out[domain], record.settings["vocab_size"], bar)
            facts[domain] = {
                "source_sha256": sources[domain],
                **counts,
                "near_duplicates": split.found[domain],
            }
    return facts, split.facts


def _split(domains: dict[str, _Pieces], corpus: Path, share: float) -> Split:
    levels = np.zeros(LEVELS, dtype=np.int64)
    documents: dict[Unit, np.ndarray] = {}
    for pieces in domains.values():
        for unit, path in pieces:
            mine = documents.setdefault(unit, np.zeros(len(unit.files), dtype=np.int64))
            if path is not None:
                found, by_file = read_arrays(path, "levels", "by_file")
                levels += found
                mine += by_file
    for unit, counts in documents.items():
        require_text(corpus, [file.name for file in unit.files], counts)
    splitter = Splitter(halvings_for(levels))
    names = {}
    for domain, pieces in domains.items():
        splitter.begin(domain)
        for _, path in pieces:
            if path is not None:
                splitter.add(read_signatures(path))
        first = pieces[0][0].files[0].name
        names[domain] = str(corpus / first.split("/")[0])
    return splitter.split(share, names)


def _write(
    out: Path, domain: str, pieces: _Pieces, held_out: np.ndarray, vocab_size: int, bar: tqdm
) -> dict[str, dict[str, int]]:
    """The two data sets of a domain."""
    at = 0
    with ExitStack() as stack:
        files = {side: stack.enter_context(TokenFile(prefix(out, domain, side), vocab_size)) for side in SPLITS}
        for _, path in pieces:
            if path is not None:
                tokens, lengths = read_arrays(path, "tokens", "lengths")
                held = held_out[at : at + len(lengths)]
                for side, chosen in (("train", ~held), ("validation", held)):
                    files[side].add(tokens[np.repeat(chosen, lengths)], lengths[chosen])
                at += len(lengths)
            bar.update()
    return {side: {"documents": file.documents, "tokens": file.tokens} for side, file in files.items()}
