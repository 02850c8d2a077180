"""Clusters of documents that are read from their tokens, against scikit-learn and planted sources."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.naive_bayes import MultinomialNB

from mocte_ds.clusters import document_scores, random_scores, shuffled_scores

V, E, DOCUMENTS, R = 120, 4, 200, 6


def planted(noise: float = 0.3, tokens: int = 30) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, documents and features of sampled tokens, and the source of each document; sources share most words."""
    generator = torch.Generator().manual_seed(0)
    usual = 1 / (torch.arange(V) + 5.0)
    words = torch.stack([usual * torch.rand(V, generator=generator).square() for _ in range(E)])
    source = torch.arange(DOCUMENTS) % E
    ids = torch.multinomial(words[source], tokens, replacement=True, generator=generator)
    centres = torch.randn(E, R, generator=generator)
    features = centres[source][:, None] + noise * torch.randn(DOCUMENTS, tokens, R, generator=generator)
    number = torch.arange(DOCUMENTS)[:, None].expand(DOCUMENTS, tokens) * 1009 + 7
    return ids.flatten(), number.flatten(), features.view(-1, R), source


def read(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The cluster for which all tokens of each document speak."""
    return scores[ids.view(DOCUMENTS, -1)].mean(1).argmax(1)


def loads_of_reading(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens of each cluster over the mean, where the document so far decides."""
    so_far = scores[ids.view(DOCUMENTS, -1)].cumsum(1) / torch.arange(1, 31)[:, None]
    return torch.bincount(so_far.argmax(2).flatten(), minlength=E) * E / len(ids)


@pytest.mark.parametrize("noise", [0.3, 6.0])
def test_planted_sources_are_read_from_the_tokens(noise: float) -> None:
    """Also where features of single tokens hardly show them: EM goes on from there."""
    ids, number, features, source = planted(noise)
    found = read(document_scores(ids, number, features, V, E, 0), ids)
    assert adjusted_rand_score(source, found) > (0.95 if noise < 1 else 0.8)
    load = loads_of_reading(document_scores(ids, number, features, V, E, 0), ids)
    assert load.max() < 1.15 and load.min() > 0.85


@pytest.mark.parametrize(
    ("vocabulary", "clusters", "documents", "tokens"), [(2000, 16, 512, 16), (8000, 16, 1024, 64), (2000, 8, 256, 8)]
)
def test_new_documents_go_where_their_source_is_and_share_out_the_clusters(
    vocabulary: int, clusters: int, documents: int, tokens: int
) -> None:
    """Short samples: with scores that a document's own tokens are in, prices would overrule all that is new."""
    generator = torch.Generator().manual_seed(1)
    usual = 1 / (torch.arange(vocabulary) + 5.0)
    words = torch.stack([usual * torch.rand(vocabulary, generator=generator).square() for _ in range(clusters)])
    source = torch.arange(documents) % clusters
    ids = torch.multinomial(words[source], tokens, replacement=True, generator=generator)
    centres = torch.randn(clusters, 16, generator=generator)
    features = centres[source][:, None] + 0.3 * torch.randn(documents, tokens, 16, generator=generator)
    number = torch.arange(documents)[:, None].expand(documents, tokens)
    scores = document_scores(ids.flatten(), number.flatten(), features.view(-1, 16), vocabulary, clusters, 0)
    new_source = torch.arange(512) % clusters
    new = torch.multinomial(words[new_source], 128, replacement=True, generator=generator)
    so_far = (scores[new].cumsum(1) / torch.arange(1, 129)[:, None]).argmax(2)
    load = torch.bincount(so_far.flatten(), minlength=clusters) * clusters / so_far.numel()
    assert adjusted_rand_score(new_source, so_far[:, -1]) > 0.85
    assert load.max() < 1.45 and load.min() > 0.6


def test_scores_are_those_of_naive_bayes() -> None:
    ids, number, features, _ = planted()
    scores = document_scores(ids, number, features, V, E, 0)
    found = read(scores, ids)
    seen, word = np.unique(ids.numpy(), return_inverse=True)
    counts = np.zeros((DOCUMENTS, len(seen)))
    np.add.at(counts, (np.arange(DOCUMENTS).repeat(30), word), 1)
    usual = counts.sum(0) / counts.sum()
    model = MultinomialNB(alpha=len(seen) * usual, fit_prior=False).fit(counts, found.numpy())
    expected = model.feature_log_prob_.T
    expected -= expected.mean(1, keepdims=True)
    ours = scores[seen].double().numpy()
    # But for one number for each cluster, which evens out the loads.
    np.testing.assert_allclose(ours - ours.mean(0), expected - expected.mean(0), atol=1e-5)
    rest = scores[np.setdiff1d(np.arange(V), seen)]
    np.testing.assert_allclose(rest, (ours - expected).mean(0)[None].repeat(len(rest), 0), atol=1e-5)


def test_the_control_has_even_loads_and_other_documents_together() -> None:
    ids, number, features, source = planted()
    scores = document_scores(ids, number, features, V, E, 0)
    other = shuffled_scores(scores, ids, number, 1)
    found = read(other, ids)
    load = loads_of_reading(other, ids)
    assert load.max() < 1.15 and load.min() > 0.85
    assert adjusted_rand_score(source, found) < 0.7 * adjusted_rand_score(source, read(scores, ids))
    assert not torch.equal(other, shuffled_scores(scores, ids, number, 2))


def test_the_order_of_the_sample_does_not_count_and_few_documents_give_chance() -> None:
    ids, number, features, _ = planted()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    scores = document_scores(ids, number, features, V, E, 0)
    torch.testing.assert_close(document_scores(ids[order], number[order], features[order], V, E, 0), scores)
    unknown = torch.cat([number, torch.full((50,), -1)])  # rows of a checkpoint of an older version
    more = torch.cat([ids, ids[:50]]), unknown, torch.cat([features, 100 * torch.ones(50, R)])
    assert torch.equal(document_scores(*more, V, E, 0), scores)
    assert torch.equal(shuffled_scores(scores, *more[:2], 1), shuffled_scores(scores, ids, number, 1))
    assert torch.equal(shuffled_scores(scores, ids, torch.full_like(ids, -1), 1), scores)
    few = number < 3 * 1009
    found = document_scores(ids[few], number[few], features[few], V, E, 5)
    assert torch.equal(found, random_scores(V, E, 5)) and found.shape == (V, E)
