"""The search for clusters: the same in a thread, shared out over ranks, and an error that leaves nobody waiting."""

import pytest
import torch

from mocte_ds.clusters import detect, stability
from mocte_ds.config import MocteConfig
from mocte_ds.controller.handles import LastDetection
from mocte_ds.controller.search import ClusterSearch, Documents, find_clusters
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import MocteError
from tests.spawn import spawn

CONFIG = MocteConfig(modules="x", num_experts=3)


def documents(seed: int, last: bool = False) -> Documents:
    """Three planted clusters, an own basis and mean, and a last check that knew them in other coordinates."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(120) % 3
    z = torch.randn(120, 2, generator=generator) + 12 * torch.eye(3)[source][:, :2]
    mean, basis = torch.randn(6, generator=generator), torch.linalg.qr(torch.randn(6, 2, generator=generator))[0]
    known = None
    if last:
        turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
        known = LastDetection(mean, basis @ turn, z @ turn, detect(z @ turn).labels)
    return Documents(z, mean, basis, source, z, known)


def test_it_finds_what_the_parts_find_and_knows_the_last_check() -> None:
    given = documents(0, last=True)
    found = find_clusters(CONFIG, given)
    assert found.detection.found and found.detection.count == 3
    assert torch.equal(found.detection.labels, detect(given.coordinates).labels)
    assert found.agreement == {"nmi": pytest.approx(1.0), "purity": pytest.approx(1.0)}
    assert found.stability == pytest.approx(1.0), "another basis of the same plane is not another clustering"
    assert found.seconds > 0 and found.published["clusters"] == 3
    moved = LastDetection(given.mean, given.basis, torch.randn(30, 2), torch.arange(30) % 3)
    other = find_clusters(CONFIG, Documents(**{**vars(given), "last": moved}))
    by_hand = moved.labels[torch.cdist(given.coordinates, moved.points).argmin(1)]
    clear = found.detection.labels >= 0
    assert other.stability == pytest.approx(stability(by_hand[clear], found.detection.labels[clear]))
    assert other.stability < 0.9
    crumbs = LastDetection(given.mean, given.basis, torch.randn(3, 2), torch.tensor([-1, 0, 1]))
    assert set(crumbs.assign(torch.randn(50, 6)).tolist()) == {0, 1}, "what was noise lends its label to nobody"
    unknown = Documents(**{**vars(given), "domains": torch.full((120,), -1), "last": None})
    assert find_clusters(CONFIG, unknown).agreement is None and find_clusters(CONFIG, unknown).stability is None


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_stable_sources_are_stable_for_any_number_of_experts(experts: int) -> None:
    """Other documents of the same four sources at the next check, in another basis of the same directions."""
    generator = torch.Generator().manual_seed(4)
    centres, basis = 8.0 * torch.eye(8)[:4], torch.linalg.qr(torch.randn(12, 8, generator=generator))[0]
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    source = torch.arange(400) % 4
    before, now = (centres[source] + torch.randn(400, 8, generator=generator) for _ in range(2))
    last = LastDetection(torch.zeros(12), basis @ turn, before @ turn, detect(before @ turn).labels)
    given = Documents(now, torch.zeros(12), basis, source, now, last)
    found = find_clusters(MocteConfig(modules="x", num_experts=experts), given)
    assert found.detection.count == 4 and found.stability > 0.99
    assert find_clusters(CONFIG, Documents(**{**vars(given), "coordinates": torch.randn(400, 8)})).stability is None


def test_a_thread_finds_the_same() -> None:
    work = {block: documents(block, last=True) for block in range(3)}
    one, other = (ClusterSearch(CONFIG, work, in_background=where, axis=ALONE).results() for where in (False, True))
    assert set(one) == set(other) == {0, 1, 2}
    for block in work:
        assert torch.equal(one[block].clusters.labels, other[block].clusters.labels)
        assert torch.equal(one[block].clusters.prices, other[block].clusters.prices)
        assert one[block].stability == other[block].stability and one[block].agreement == other[block].agreement


def share_out(broken: int | None) -> object:
    """Results of five blocks on this rank, or the error; the documents of block ``broken`` are not finite."""
    work = {block: documents(block) for block in range(5)}
    if broken is not None:
        work[broken] = Documents(**{**vars(work[broken]), "coordinates": torch.full((120, 2), torch.nan)})
    try:
        found = ClusterSearch(CONFIG, work, in_background=True, axis=mesh_of_processes().world).results()
    except MocteError as error:
        return str(error)
    return {block: facts.clusters.labels.tolist() for block, facts in found.items()}


def test_ranks_share_the_blocks_and_fail_together() -> None:
    alone = {block: find_clusters(CONFIG, documents(block)).clusters.labels.tolist() for block in range(5)}
    assert spawn(share_out, 2, None, timeout=60) == [alone, alone]
    messages = spawn(share_out, 2, 3, timeout=60)
    assert messages[0] == messages[1] and "NaN" in messages[0]
