"""Balanced clusters: the cheapest assignment of equal mass, by a rule that a linear gate can store."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from mocte_ds.clusters import balanced_kmeans, prices
from mocte_ds.errors import MocteError


def cloud(n: int, r: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, r, generator=generator) * torch.linspace(2.0, 0.5, r)
    points[: n // 3] += 3.0
    return points


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 4, 5])
def test_no_equal_assignment_is_cheaper(count: int, seed: int) -> None:
    points = cloud(40 * count, 3, seed)
    found = balanced_kmeans(points, count, seed)
    assert torch.bincount(found.labels, minlength=count).tolist() == [40] * count
    cost = torch.cdist(points.double(), found.centroids.double()).square()
    # Every centroid forty times: an assignment problem that scipy solves exactly.
    rows, columns = linear_sum_assignment(cost.repeat_interleave(40, dim=1).numpy())
    best = cost.repeat_interleave(40, dim=1)[rows, columns].sum()
    ours = cost.gather(1, found.labels[:, None]).sum()
    assert float(ours) == pytest.approx(float(best), rel=1e-6)


@pytest.mark.parametrize("directions", [False, True])
def test_loads_are_even_and_the_rule_gives_the_labels(directions: bool) -> None:
    points = cloud(3000, 6, 1)
    found = balanced_kmeans(points, 7, 3, directions=directions)
    load = torch.bincount(found.labels, minlength=7)
    assert load.min() > 0.97 * 3000 / 7 and load.max() < 1.03 * 3000 / 7
    assert torch.equal(found.assign(points), found.labels)
    if directions:
        assert torch.equal(found.assign(5 * points), found.labels)
        torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(7))
    again = balanced_kmeans(points, 7, 3, directions=directions)
    assert torch.equal(again.labels, found.labels) and torch.equal(again.prices, found.prices)


def test_planted_clusters_are_found() -> None:
    centres = 10 * torch.eye(4)
    truth = torch.arange(4).repeat_interleave(50)
    found = balanced_kmeans(centres[truth] + 0.5 * torch.randn(200, 4), 4, 0)
    assert adjusted_rand_score(truth.numpy(), found.labels.numpy()) == 1.0
    torch.testing.assert_close(found.centroids.sort(dim=0).values, centres.sort(dim=0).values, atol=0.5, rtol=0)


def test_mass_counts_not_points() -> None:
    points, mass = cloud(2000, 3, 2), torch.rand(2000) + 0.01
    mass[:100] *= 20
    found = balanced_kmeans(points, 4, 0, mass=mass)
    load = torch.zeros(4).index_add_(0, found.labels, mass)
    assert load.max() / load.min() < 1.1
    counts = torch.bincount(found.labels, minlength=4)
    assert counts.max() / counts.min() > 1.1, "equal numbers of points would not be equal mass here"


def test_equal_points_stay_together() -> None:
    found = balanced_kmeans(torch.ones(30, 2), 3, 0)
    assert len(found.labels.unique()) == 1
    halves = torch.cat([torch.zeros(30, 2), torch.ones(30, 2)])
    labels = balanced_kmeans(halves, 2, 0).labels
    assert len(labels[:30].unique()) == 1 and len(labels[30:].unique()) == 1 and labels[0] != labels[30]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.ones(2, 3), "3 clusters need at least 3 points"),
        (torch.full((9, 3), float("nan")), "NaN or infinite"),
        (torch.ones(9), "need at least 3 points"),
    ],
)
def test_refusals(points: torch.Tensor, message: str) -> None:
    with pytest.raises(MocteError, match=message):
        balanced_kmeans(points, 3, 0)


def test_points_without_coordinates_are_refused() -> None:
    with pytest.raises(MocteError, match="at least one coordinate"):
        balanced_kmeans(torch.zeros(64, 0), 4)


@pytest.mark.parametrize("directions", [False, True])
def test_work_is_bounded_where_loads_cannot_be_even(monkeypatch: pytest.MonkeyPatch, directions: bool) -> None:
    """Of 2,048 points half are the same one, so that no prices are right: the search ends after a number of tries."""
    points = cloud(2048, 8, 2)
    points[::2] = points[0]
    tries = 0
    search = prices._Offers.winning_price

    def counted(self, k, mass, share):
        nonlocal tries
        tries += 1
        return search(self, k, mass, share)

    monkeypatch.setattr(prices._Offers, "winning_price", counted)
    found = balanced_kmeans(points, 128, directions=directions)
    assert len(found.labels[::2].unique()) == 1 and len(found.centroids) == 128
    # Ten steps of two sweeps and twenty at the end, over 128 clusters.
    assert 128 < tries <= 128 * (10 * 2 + 20), tries
