"""Controls have the sizes of the clusters that they stand beside, and nothing else of them."""

import pytest
import torch

from mocte_ds.clusters.compare import agreement
from mocte_ds.clusters.control import random_clusters, shuffled_table

V, E = 400, 4


def test_a_shuffled_table_has_the_loads_of_the_found_one_and_other_members() -> None:
    torch.manual_seed(0)
    frequency = 1 / (torch.arange(V) + 20.0)  # as words have it
    ids = torch.multinomial(frequency, 20_000, replacement=True)
    table = torch.multinomial(torch.tensor([0.5, 0.25, 0.15, 0.1]), V, replacement=True)
    found = shuffled_table(table, ids, E, seed=3)
    wanted, loads = (torch.bincount(each[ids], minlength=E) / len(ids) for each in (table, found))
    torch.testing.assert_close(loads, wanted, atol=0.02, rtol=0)
    assert agreement(found[ids], table[ids])["nmi"] < 0.05
    assert torch.equal(found, shuffled_table(table, ids, E, seed=3))
    assert not torch.equal(found, shuffled_table(table, ids, E, seed=4))


@pytest.mark.parametrize("directions", [True, False])
def test_random_centroids_get_even_loads_and_miss_the_clusters(directions: bool) -> None:
    torch.manual_seed(0)
    source = torch.arange(2000) % E
    points = torch.cat([torch.eye(E)[source] * 4, torch.zeros(2000, 4)], dim=1) + torch.randn(2000, 8)
    points -= points.mean(0)
    found = random_clusters(points, E, seed=1, directions=directions)
    load = torch.bincount(found.assign(points), minlength=E)
    assert load.max() < 1.1 * 500 and load.min() > 0.9 * 500
    assert agreement(found.labels, source)["nmi"] < 0.5
