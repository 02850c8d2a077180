"""Prepared data, its training documents in clusters: each is a domain to train on, validation stays what it was."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mocte_ds.btm.terms import TermSpace, find_clusters
from mocte_ds.data import Manifest
from mocte_ds.data.manifest import FORMAT, NAME, SPLITS, open_indexed, prefix
from mocte_ds.data.stored_tokenizer import tokenizer_files, tokenizer_in
from mocte_ds.data.token_file import TokenFile
from mocte_ds.data.verify import chunk_hashes
from mocte_ds.errors import DataError
from mocte_ds.ownership import replace_folder, require_apart, require_new_or_ours

TOOL = "btm"
SPACE = "clusters.npz"
"""The file with the space in which contexts are compared."""
_ENDS = (".bin", ".idx")


def cluster_name(number: int) -> str:
    """Name of the domain that holds a cluster's documents."""
    return f"cluster{number}"


def partition(
    prepared: str | Path, out: str | Path, clusters: int, rank: int = 100, seed: int = 0
) -> dict[str, dict[str, int]]:
    """Write prepared data whose domains for training are clusters of documents.

    A run reads one of them with `data.weights: {cluster3: 1}`. Validation has the same documents and domains as before,
    so that losses compare with those of any run on ``prepared``.

    Args:
        prepared: folder of tools/prepare_data.py; only read.
        out: folder to write; appears as a whole at the end. An earlier one of this tool there is replaced.
        clusters: how many.
        rank: directions of the truncated SVD.
        seed: of it and of k-means.

    Returns:
        By cluster "documents" and "tokens", and "from": how many of its documents come from each domain.

    Raises:
        DataError: the data is missing or damaged, too small, or has a domain with the name of a cluster.
        NotOurs: ``out`` holds something else, or overlaps with ``prepared``.
    """
    prepared = Path(prepared)
    manifest = Manifest.read(prepared)
    tokenizer = manifest.require_tokenizer(tokenizer_in(prepared))
    require_apart(Path(out), prepared)
    out = require_new_or_ours(Path(out), TOOL)
    names = [cluster_name(number) for number in range(clusters)]
    if taken := set(names) & set(manifest.domains):
        raise DataError(f"{prepared} has a domain {min(taken)}; the clusters would be called so. Rename the domain.")
    domains = sorted(manifest.domains)
    data = {domain: open_indexed(prepared, manifest, domain, "train") for domain in domains}
    places = [(domain, number) for domain in domains for number in range(len(data[domain]))]
    documents = [np.asarray(data[domain].get(number)) for domain, number in places]
    tokens = np.array([len(ids) for ids in documents])
    space, labels = find_clusters(
        _counts(documents, manifest.vocab_size), tokens, clusters, rank, seed, manifest.eod_id
    )
    try:
        with replace_folder(out, TOOL) as pending:
            _write(pending, prepared, manifest, documents, labels, names)
            for name, path in tokenizer_files(tokenizer).items():
                (pending / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, pending / name)
            space.write(pending / SPACE)
    except OSError as error:
        raise DataError(f"could not write {out}: {error.strerror or error}.") from error
    facts: dict[str, Any] = {}
    for number, name in enumerate(names):
        mine = [domain for (domain, _), label in zip(places, labels, strict=True) if label == number]
        facts[name] = {
            "documents": len(mine),
            "tokens": int(tokens[labels == number].sum()),
            "from": {domain: mine.count(domain) for domain in domains},
        }
    return facts


def read_space(folder: str | Path) -> TermSpace:
    """The space that :func:`partition` has left in its folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return TermSpace.read(Path(folder) / SPACE)


def _counts(documents: list[np.ndarray], vocab_size: int) -> Any:
    """(n, V) how often each id is in each document, sparse."""
    from scipy.sparse import csr_matrix

    found = [np.unique(ids, return_counts=True) for ids in documents]
    starts = np.cumsum([0, *(len(ids) for ids, _ in found)])
    columns, values = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
    return csr_matrix((values.astype(np.float64), columns, starts), shape=(len(documents), vocab_size))


def _write(
    folder: Path, prepared: Path, manifest: Manifest, documents: list[np.ndarray], labels: np.ndarray, names: list[str]
) -> None:
    """The data sets and their manifest."""
    facts: dict[str, dict[str, Any]] = {}
    source = hashlib.sha256(manifest.sha256.encode() + labels.astype(np.int64).tobytes()).hexdigest()
    nothing = {"documents": 0, "tokens": 0}
    for number, name in enumerate(names):
        mine = [ids for ids, label in zip(documents, labels, strict=True) if label == number]
        with TokenFile(prefix(folder, name, "train"), manifest.vocab_size) as file:
            for ids in mine:
                file.add(ids, np.array([len(ids)]))
        with TokenFile(prefix(folder, name, "validation"), manifest.vocab_size):
            pass
        train = {"documents": file.documents, "tokens": file.tokens}
        facts[name] = {"source_sha256": source, "train": train, "validation": nothing}
    for domain, found in manifest.domains.items():
        with TokenFile(prefix(folder, domain, "train"), manifest.vocab_size):
            pass
        for end in _ENDS:
            shutil.copyfile(
                f"{prefix(prepared, domain, 'validation')}{end}", f"{prefix(folder, domain, 'validation')}{end}"
            )
        facts[domain] = {**found, "train": nothing}
    files = [f"{prefix('', domain, split)}{end}" for domain in facts for split in SPLITS for end in _ENDS]
    Manifest(
        FORMAT,
        manifest.tokenizer_sha256,
        manifest.vocab_size,
        manifest.eod_id,
        manifest.validation_share,
        facts,
        manifest.near_duplicates,
        {name: chunk_hashes(folder / name) for name in files},
    ).write(folder / NAME)
