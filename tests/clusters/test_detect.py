"""Clusters that are there are found, with their number; clouds, however odd, are not."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from mocte_ds.clusters import agreement, detect, published_line, stability
from mocte_ds.clusters.start import principal_pieces, principal_pieces_by_count
from mocte_ds.errors import MocteError


def planted(count: int, n: int, seed: int, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters of unequal size and width, centres at least six widths apart, and which each point is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = 9.0 * torch.linalg.qr(torch.randn(max(r, count), max(r, count), generator=generator)).Q[:count, :r]
    if count > r:
        centres = 9.0 * torch.cat([torch.eye(r), -torch.eye(r)])[:count]
    truth = torch.arange(n) % count
    width = 0.6 + 0.4 * torch.rand(count, generator=generator)
    return centres[truth] + width[truth][:, None] * torch.randn(n, r, generator=generator), truth


@pytest.mark.parametrize("method", ["dbscan", "hdbscan"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_planted_clusters(count: int, seed: int, method: str) -> None:
    z, truth = planted(count, 120 * count, seed)
    found = detect(z, method=method)
    assert found.found and found.count == count, found.reason
    clear = found.labels >= 0
    assert clear.float().mean() > 0.5
    assert adjusted_rand_score(truth[clear].numpy(), found.labels[clear].numpy()) > 0.99
    assert found.noise == pytest.approx(float((~clear).float().mean()))
    own = silhouette_score(z[clear].numpy(), found.labels[clear].numpy())
    assert found.silhouette == pytest.approx(own, abs=0.03)
    assert torch.equal(detect(1e4 * z + 7, method=method).labels, found.labels), "scale and place do not matter"


def structureless(kind: str, n: int, r: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "gaussian":
        return rng.normal(size=(n, r)) * np.linspace(3, 0.5, r)
    if kind == "heavy":
        return rng.standard_t(3, size=(n, r))
    if kind == "uniform":
        return rng.uniform(-1, 1, size=(n, r))
    giant = rng.normal(size=(n, r))
    crumbs = 12.0 * rng.normal(size=(3, r))
    giant[: n // 10] = crumbs[rng.integers(0, 3, n // 10)] + 0.1 * rng.normal(size=(n // 10, r))
    return giant


@pytest.mark.parametrize("method", ["dbscan", "hdbscan"])
@pytest.mark.parametrize("n", [60, 400, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "uniform", "giant"])
def test_nothing_is_found_where_nothing_is(kind: str, n: int, method: str) -> None:
    rng = np.random.default_rng(n)
    for r in (2, 4, 8):
        for _ in range(4 if n < 2000 else 1):
            found = detect(torch.from_numpy(structureless(kind, n, r, rng)), method=method)
            assert not found.found, (kind, n, r, found.reason)
            assert found.reason


def test_degenerate_input() -> None:
    assert not detect(torch.ones(100, 3)).found
    assert "too few" in detect(torch.randn(10, 3)).reason
    with pytest.raises(MocteError, match="NaN or infinite"):
        detect(torch.full((100, 3), float("inf")))
    with pytest.raises(MocteError, match="matrix"):
        detect(torch.zeros(100))
    with pytest.raises(MocteError, match="'kmeans' is not one of"):
        detect(torch.zeros(100, 2), method="kmeans")


def test_agreement_and_stability_are_those_of_scikit_learn() -> None:
    one, other = torch.randint(4, (300,)), torch.randint(5, (300,))
    other[:150] = one[:150]
    assert stability(one, other) == pytest.approx(adjusted_rand_score(one.numpy(), other.numpy()))
    found = agreement(one, other)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(other.numpy(), one.numpy()))
    best = sum(int(torch.bincount(other[one == k]).max()) for k in range(4)) / 300
    assert found["purity"] == pytest.approx(best)
    # Noise and unknown sources are left out.
    one[:20], other[20:40] = -1, -1
    assert agreement(one, other) == agreement(one[40:], other[40:])
    assert agreement(torch.full((5,), -1), torch.zeros(5, dtype=torch.int64)) == {"nmi": 0.0, "purity": 0.0}


def test_published_line_on_tokens() -> None:
    cloud = torch.randn(1500, 3)
    found = published_line(cloud)
    assert found["clusters"] == 1 and found["largest"] > 0.9, "one giant cluster"
    assert published_line(7 * cloud + 3) == pytest.approx(found)
    z, _ = planted(3, 300, 0, r=3)
    assert published_line(z)["clusters"] == 3
    assert published_line(torch.zeros(5, 2)) == {"clusters": 0, "noise": 1.0, "largest": 0.0}


def sources(count: int, separation: float, seed: int, n: int = 1024, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clusters of variance 1, all pairs of centres equally far; and which each point is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(r, count, generator=generator)).Q.T * separation / 2**0.5
    truth = torch.arange(n) % count
    return centres[truth] + torch.randn(n, r, generator=generator), truth


@pytest.mark.parametrize("count", [2, 4, 6])
def test_clusters_that_touch_in_their_tails(count: int) -> None:
    """At the default rank and number of documents, where distances in all directions show nothing."""
    for seed, separation in enumerate((5.0, 6.0)):
        z, truth = sources(count, separation, seed)
        found = detect(z)
        assert found.found and found.count == count, (separation, found.reason)
        clear = found.labels >= 0
        assert clear.float().mean() > 0.5
        assert adjusted_rand_score(truth[clear].numpy(), found.labels[clear].numpy()) > 0.9
        assert not detect(sources(count, 2.0, seed)[0]).found, "two standard deviations are one cloud"


def test_arcs_and_copies() -> None:
    rng = np.random.default_rng(0)
    angle, arc = rng.uniform(0, 1.2 * np.pi, 1000), np.arange(1000) % 3
    z = 0.7 * rng.normal(size=(1000, 8))
    z[:, 0] += 10 * np.cos(angle) + 25 * arc
    z[:, 1] += 10 * np.sin(angle)
    found = detect(torch.from_numpy(z))
    assert found.found, found.reason
    clear = found.labels.numpy() >= 0
    assert clear.mean() > 0.5 and normalized_mutual_info_score(arc[clear], found.labels.numpy()[clear]) > 0.6
    # Each document four times, as in a corpus that was not cleaned.
    z, truth = sources(4, 8.0, 1, n=256, r=16)
    copies = torch.arange(256).repeat(4)
    found = detect(z[copies])
    assert found.found and found.count == 4, found.reason
    assert torch.equal(found.labels, found.labels[:256].repeat(4)), "copies are of one cluster"
    assert found.silhouette == pytest.approx(detect(z).silhouette)
    assert "of 200 points 5 differ, too few" in detect(torch.eye(5).repeat(40, 1)).reason


def test_more_points_than_are_looked_at() -> None:
    z, truth = planted(3, 6000, 0)
    found = detect(z)
    clear = found.labels >= 0
    assert found.found and found.count == 3 and clear.float().mean() > 0.9
    assert adjusted_rand_score(truth[clear].numpy(), found.labels[clear].numpy()) > 0.99


@pytest.mark.parametrize("kind", ["walk", "spiral", "ring", "levels"])
def test_curves_and_grids_are_no_clusters(kind: str) -> None:
    rng = np.random.default_rng(3)
    if kind == "walk":
        z = rng.normal(size=(800, 8)).cumsum(0)
    elif kind == "levels":
        z = rng.integers(0, 10, size=(800, 8)).astype(float)
    else:
        turn = rng.uniform(1, 10, 800)
        radius = turn if kind == "spiral" else np.full(800, 5.0)
        z = 0.1 * rng.normal(size=(800, 8))
        z[:, 0] += radius * np.cos(turn)
        z[:, 1] += radius * np.sin(turn)
    found = detect(torch.from_numpy(z))
    assert not found.found, found.reason


def test_pieces_for_several_counts_are_those_for_each() -> None:
    z = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, counts = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64), (2, 3, 7, 12)
    for count, labels in zip(counts, principal_pieces_by_count(z, w, counts, even=False), strict=True):
        assert torch.equal(labels, principal_pieces(z, w, count, even=False)) and int(labels.max()) == count - 1
