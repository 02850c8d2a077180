"""Groups by density: at one radius those of DBSCAN, apart only where a far larger radius still parts them."""

import numpy as np
from sklearn.cluster import DBSCAN

from mocte_ds.clusters.density import Neighbourhood, join_groups, separate_groups

K = 8


def two(gap: float) -> tuple[np.ndarray, Neighbourhood]:
    """Two clusters of 100 points in a plane."""
    points = np.random.default_rng(0).normal(size=(200, 2))
    points[100:, 0] += gap
    return points, Neighbourhood.of(np.linalg.norm(points[:, None] - points, axis=2), K)


def test_counts_are_those_of_dbscan() -> None:
    points, near = two(6.0)
    for quantile in (0.5, 0.8, 0.95):
        radius = float(np.quantile(near.reach, quantile))
        model = DBSCAN(eps=radius, min_samples=K).fit(points)
        core = model.labels_[model.core_sample_indices_]
        expected = int((np.bincount(core) >= 10).sum())
        assert near.counts((quantile,), np.ones(200), 10) == [expected]


def test_only_an_emptier_region_parts() -> None:
    for gap, expected in ((8.0, 2), (1.0, 1)):
        _, near = two(gap)
        labels = separate_groups(near, np.ones(200), 10, 4.0)
        assert len(set(labels[labels >= 0])) == expected
        halves = np.arange(200) // 100
        joined = join_groups(near, halves, 4.0)
        assert len(set(joined)) == expected, "what another method has cut is judged alike"
    labels = separate_groups(two(8.0)[1], np.ones(200), 150, 4.0)
    assert set(labels) <= {-1, 0}, "a group under the least mass is not a cluster"
