"""Clusters of documents against scikit-learn's pipeline, contexts token by token, and shares of experts."""

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from mocte_ds.btm.terms import TermSpace, find_clusters
from mocte_ds.errors import DataError

VOCAB, END, RANK, SOURCES = 90, 1, 4, 4


def documents(seed: int = 0, sizes: tuple[int, ...] = (60, 60, 60, 60)) -> tuple[list[np.ndarray], np.ndarray]:
    """Texts of sources with ids of their own beside common ones, each with an end, and their sources."""
    rng, found, sources = np.random.default_rng(seed), [], []
    for source, count in enumerate(sizes):
        own = np.arange(10 + 20 * source, 30 + 20 * source)
        for _ in range(count):
            length = int(rng.integers(20, 60))
            ids = np.where(rng.random(length) < 0.6, rng.choice(own, length), rng.integers(2, 10, length))
            found.append(np.append(ids, END))
            sources.append(source)
    order = rng.permutation(len(found))
    return [found[i] for i in order], np.array(sources)[order]


def counts(texts: list[np.ndarray]) -> Any:
    return csr_matrix(np.stack([np.bincount(ids, minlength=VOCAB) for ids in texts]).astype(float))


def pipeline(texts: list[np.ndarray]) -> Any:
    """scikit-learn's own, over lists of ids in place of words; the end of a document is a stop word."""
    words = TfidfVectorizer(analyzer=lambda ids: [str(i) for i in ids if i != END])
    return make_pipeline(words, TruncatedSVD(RANK, random_state=0), Normalizer()).fit(texts)


def test_documents_and_clusters_are_those_of_scikit_learn() -> None:
    texts, sources = documents()
    space, labels = find_clusters(counts(texts), np.array([len(t) for t in texts]), SOURCES, RANK, 0, END)
    theirs = pipeline(texts).transform(texts)
    ours = space.embed(counts(texts))
    # Four directions tell four sources apart, known up to signs and turns: compare all angles.
    assert np.allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-3)
    clusters = KMeans(SOURCES, n_init=10, random_state=0).fit_predict(theirs)
    assert adjusted_rand_score(clusters, sources) == 1.0, "the sources cannot be told apart"
    assert adjusted_rand_score(labels, clusters) > 0.95, "even tokens move documents at the borders alone"
    for k in range(SOURCES):
        assert np.allclose(space.centres[k], ours[labels == k].mean(0), atol=0.05)


def test_clusters_have_equally_many_tokens_where_sources_do_not() -> None:
    texts, _ = documents(1, (150, 50, 30, 30))
    tokens = np.array([len(ids) for ids in texts])
    _, labels = find_clusters(counts(texts), tokens, SOURCES, RANK, 0, END)
    load = np.bincount(labels, weights=tokens, minlength=SOURCES)
    assert np.abs(load / load.mean() - 1).max() < 0.1
    plain = KMeans(SOURCES, n_init=10, random_state=0).fit_predict(pipeline(texts).transform(texts))
    load = np.bincount(plain, weights=tokens, minlength=SOURCES)
    assert np.abs(load / load.mean() - 1).max() > 0.5, "no constraint is needed here"


def test_a_context_is_its_document_so_far() -> None:
    texts, _ = documents(2)
    space, _ = find_clusters(counts(texts), np.array([len(t) for t in texts]), SOURCES, RANK, 0, END)
    sequence = np.concatenate([texts[0][-9:], texts[1], texts[2][:11]])
    found = space.contexts(sequence, END)
    for t in range(len(sequence)):
        before = np.flatnonzero(sequence[: t + 1] == END)
        start = before[-1] + 1 if len(before) else 0
        so_far = sequence[start : t + 1]
        expected = space.embed(counts([so_far]))[0] if len(so_far) else np.zeros(RANK)
        assert np.allclose(found[t], expected, atol=1e-9), t
    changed = sequence.copy()
    changed[30:] = 12
    assert np.array_equal(space.contexts(changed, END)[:30], found[:30])


def test_shares_fall_with_the_squared_distance() -> None:
    rng = np.random.default_rng(3)
    centres, contexts = rng.normal(size=(5, RANK)), rng.normal(size=(7, RANK))
    space = TermSpace(np.ones(VOCAB), rng.normal(size=(VOCAB, RANK)), centres)
    distance = np.square(contexts[:, None] - centres[None]).sum(-1)
    assert np.allclose(space.weights(contexts, 0.7, 5), softmax(-distance / 0.7, axis=1))
    two = space.weights(contexts, 0.7, 2)
    near = np.sort(np.argsort(distance, axis=1)[:, :2], axis=1)
    assert np.array_equal(np.array([np.flatnonzero(row) for row in two]), near)
    for row, pair, far in zip(two, near, distance, strict=True):
        assert np.allclose(row[pair], softmax(-far[pair] / 0.7))
    assert np.allclose(space.weights(contexts, np.inf, 5), 0.2)
    assert np.array_equal(space.weights(contexts, 1e-6, 5) > 0.5, space.weights(contexts, 1.0, 1) == 1.0)


def test_too_few_documents() -> None:
    texts, _ = documents(4, (2, 1, 1, 0))
    with pytest.raises(DataError, match="more documents and ids than the 4 and 90"):
        find_clusters(counts(texts), np.ones(4), SOURCES, RANK, 0, END)
