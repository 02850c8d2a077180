"""What a gate stores gives every feature the cluster that the clustering gives it."""

import pytest
import torch

from mocte_ds.clusters import balanced_kmeans, hash_table, linear_gate, subspace_without_mean, type_table

D, R, E = 24, 5, 6


def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (n, d), their mean and an orthonormal basis of some directions."""
    h = torch.randn(900, D) @ torch.randn(D, D) + 4 * torch.randn(D)
    return h, h.mean(0), torch.linalg.qr(torch.randn(D, R)).Q


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gate_is_the_clustering(bias: bool) -> None:
    h, mean, basis = features()
    if not bias:
        basis = subspace_without_mean(basis, mean)
    coordinates = (h - mean) @ basis
    clusters = balanced_kmeans(coordinates, E, 0, directions=not bias)
    weight, offset = linear_gate(clusters, basis, mean)
    assert weight.shape == (E, D) and offset.shape == (E,)
    assert bool(offset.any()) is bias
    logits = h.double() @ weight.double().T + offset.double()
    best = logits.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.float().mean() > 0.98
    assert torch.equal(logits.argmax(1)[clear], clusters.labels[clear])
    # New features, never seen by the clustering.
    new = torch.randn(200, D) * 5 + mean
    routed = (new @ weight.T + offset).argmax(1)
    assert (routed == clusters.assign((new - mean) @ basis)).float().mean() > 0.99


def test_nearest_centroid_without_prices() -> None:
    h, mean, basis = features()
    clusters = balanced_kmeans((h - mean) @ basis, E, 0)
    clusters.prices.zero_()
    weight, offset = linear_gate(clusters, basis, mean)
    nearest = torch.cdist(((h - mean) @ basis).double(), clusters.centroids.double()).argmin(1)
    assert ((h @ weight.T + offset).argmax(1) == nearest).float().mean() > 0.99


@pytest.mark.parametrize("inside", [False, True])
def test_subspace_without_mean(inside: bool) -> None:
    _, mean, basis = features()
    if inside:
        mean = basis @ torch.randn(R)
    found = subspace_without_mean(basis, mean)
    assert found.shape == (D, R - 1 if inside else R)
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1]), atol=1e-5, rtol=0)
    assert (found.T @ mean).abs().max() < 1e-4 * mean.norm()
    # Nothing new comes in: the span lies in that of the basis and the mean.
    span = torch.linalg.qr(torch.cat([basis, mean[:, None]], dim=1)).Q
    torch.testing.assert_close(span @ (span.T @ found), found, atol=1e-4, rtol=0)
    assert torch.equal(subspace_without_mean(basis, torch.zeros(D)), basis)


def test_type_table_follows_the_means_of_token_ids() -> None:
    ids = torch.randint(40, (4000,))
    centre = 6.0 * torch.nn.functional.one_hot(ids % 4, 4)
    table = type_table(ids, centre + torch.randn(4000, 4), 100, 4, 0)
    assert table.shape == (100,) and table.dtype == torch.int64
    groups = [table[:40][torch.arange(40) % 4 == g].unique() for g in range(4)]
    assert all(len(group) == 1 for group in groups) and len(torch.cat(groups).unique()) == 4
    assert torch.bincount(table[40:], minlength=4).min() > 5, "ids that were not sampled are dealt out"


def test_hash_table_is_even_and_random() -> None:
    table = hash_table(1001, 4, 0)
    assert torch.bincount(table, minlength=4).tolist() == [251, 250, 250, 250]
    assert torch.equal(table, hash_table(1001, 4, 0))
    assert 0.15 < (table == hash_table(1001, 4, 1)).float().mean() < 0.35
