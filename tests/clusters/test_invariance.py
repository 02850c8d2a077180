"""Clusters that hang on nothing but the points: no order of rows, no sign of a direction, no rounding."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from mocte_ds.clusters import balanced_kmeans, detect


def points(separated: bool, n: int = 400, r: int = 6, clusters: int = 4) -> tuple[Tensor, torch.Generator]:
    """Some clusters, or a cloud without any."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(n, r, generator=generator) * torch.linspace(1.5, 0.7, r)
    return z + 9.0 * torch.eye(max(r, clusters))[:, :r][torch.arange(n) % clusters] if separated else z, generator


def variants(z: Tensor, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """The same points written down in other ways, and where each row comes from."""
    n, r = z.shape
    same, other = torch.arange(n), torch.randperm(n, generator=generator)
    turn = torch.linalg.qr(torch.randn(r, r, generator=generator))[0]
    noise = 1e-5 * torch.randn(n, r, generator=generator)
    return {
        "permuted": (z[other], other),
        "mirrored": (z * torch.tensor([-1.0, 1.0] * (r // 2)), same),
        "turned": (z @ turn, same),
        "rounded": (z + noise, same),
        "sorted by a rounded coordinate": ((z + noise)[(z + noise)[:, 0].argsort()], (z + noise)[:, 0].argsort()),
    }


@pytest.mark.parametrize("directions", [False, True])
@pytest.mark.parametrize("separated", [True, False])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_balanced_clusters(count: int, separated: bool, directions: bool) -> None:
    z, generator = points(separated, clusters=count)
    found = balanced_kmeans(z, count, 0, directions=directions).labels
    for name, (other, place) in variants(z, generator).items():
        labels = balanced_kmeans(other, count, 0, directions=directions).labels
        if separated:
            assert torch.equal(labels, found[place]), name
        # A cloud is cut anywhere, but everywhere alike: rounding may move points at a boundary only.
        assert adjusted_rand_score(found[place].numpy(), labels.numpy()) > 0.97, name
        assert (labels == found[place]).float().mean() > 0.97, f"{name}: other numbers for the same clusters"


@pytest.mark.parametrize("method", ["dbscan", "hdbscan"])
def test_detected_clusters(method: str) -> None:
    z, generator = points(separated=True)
    found = detect(z, method=method)
    assert found.found and found.count == 4
    for name, (other, place) in variants(z, generator).items():
        labels = detect(other, method=method).labels
        both = (labels >= 0) & (found.labels[place] >= 0)
        assert both.float().mean() > 0.9 and ((labels >= 0) == (found.labels[place] >= 0)).float().mean() > 0.97, name
        assert adjusted_rand_score(found.labels[place][both].numpy(), labels[both].numpy()) == 1.0, name
    cloud, generator = points(separated=False)
    assert not any(detect(other, method=method).found for other, _ in variants(cloud, generator).values())


def test_another_start_must_be_clearly_better() -> None:
    """All starts find separated clusters, so the seed of the later ones changes nothing, not even the numbers."""
    z, _ = points(separated=True)
    first = balanced_kmeans(z, 4, 0)
    for seed in (1, 2, 3):
        assert torch.equal(balanced_kmeans(z, 4, seed).labels, first.labels)


def test_many_clusters_are_as_even_and_as_cheap_as_few() -> None:
    """More scores than one start may look at three times: loads stay even, and the cost near that of plain k-means."""
    from sklearn.cluster import KMeans

    z = torch.randn(2100, 4, generator=torch.Generator().manual_seed(1))
    found = balanced_kmeans(z, 64)
    load = torch.bincount(found.labels, minlength=64)
    assert load.min() >= 30 and load.max() <= 36  # 32.8 is even
    cost = float((z - found.centroids[found.labels]).square().sum())
    assert cost < 1.15 * KMeans(64, n_init=1, random_state=0).fit(z.numpy()).inertia_
