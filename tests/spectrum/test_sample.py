"""The sample of features: a uniform choice that does not depend on how the rows are shared out."""

import numpy as np
import pytest
import torch

from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import MocteError
from mocte_ds.spectrum.sample import Reservoir, hash_keys, mix
from tests.spawn import spawn


def _splitmix(state: int) -> int:
    """SplitMix64 in Python's unbounded integers, as published."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_splitmix() -> None:
    assert _splitmix(0) == 0xE220A8397B1DCDAF  # the published first number of seed 0
    values = torch.tensor([0, 1, -5, 1 << 40, (1 << 63) - 1])
    expected = [_splitmix((v ^ 12345) % (1 << 64)) for v in values.tolist()]
    assert [v % (1 << 64) for v in mix(12345, values).tolist()] == expected


def test_keys_are_distinct_and_seeded() -> None:
    sequence = torch.arange(300)[:, None].expand(300, 200)
    position = torch.arange(200).expand(300, 200)
    keys = hash_keys(sequence, position, 7)
    assert keys.unique().numel() == 60000 and keys.min() >= 0
    assert not torch.equal(keys, hash_keys(sequence, position, 8))
    assert not torch.equal(hash_keys(position, sequence, 7), keys)
    assert not set(hash_keys(position, sequence, 1).flatten().tolist()) & set(keys.flatten().tolist())
    # Uniform: every quarter of the range gets a quarter of the keys.
    assert np.histogram(keys.numpy().astype(float), 4, (0, 2.0**63))[0].min() > 14500


def _rows(indices: torch.Tensor) -> torch.Tensor:
    return torch.stack([indices.float(), indices.float() * 2], dim=1)


def test_order_and_pieces_do_not_matter() -> None:
    indices = torch.arange(1000)
    keys = hash_keys(indices, torch.zeros_like(indices), 1)
    whole = Reservoir(64, 2, seed=3)
    whole.add(_rows(indices), keys)
    pieces = Reservoir(64, 2, seed=3)
    for part in torch.randperm(1000).split(37):
        pieces.add(_rows(indices[part]), keys[part])
    assert torch.equal(whole.rows(), pieces.rows()) and torch.equal(whole.keys(), pieces.keys())
    assert torch.equal(keys[whole.rows()[:, 0].long()], whole.keys())
    other = Reservoir(64, 2, seed=4)
    other.add(_rows(indices), keys)
    assert not torch.equal(whole.rows(), other.rows())


def test_every_row_has_the_same_chance() -> None:
    chosen = torch.zeros(100)
    indices = torch.arange(100)
    for seed in range(400):
        reservoir = Reservoir(25, 2, seed)
        reservoir.add(_rows(indices), indices)
        chosen[reservoir.rows()[:, 0].long()] += 1
    # 100 expected, standard deviation 8.7; the row numbers themselves are the keys here.
    assert chosen.min() > 60 and chosen.max() < 140
    assert abs(float(torch.corrcoef(torch.stack([chosen, indices.float()]))[0, 1])) < 0.3


def test_rows_are_copies_and_clear_forgets() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    reservoir = Reservoir(8, 2, seed=0)
    reservoir.add(rows, torch.arange(3))
    with torch.no_grad():
        rows.zero_()
    assert reservoir.rows().sum() == 6 and not reservoir.rows().requires_grad
    reservoir.clear()
    assert reservoir.rows().shape == (0, 2) and reservoir.keys().shape == (0,)
    huge = Reservoir(1 << 50, 2, seed=0)
    huge.add(torch.ones(3, 2), torch.arange(3))
    assert huge.rows().shape == (3, 2), "memory is for rows, not for a capacity"
    half = Reservoir(8, 2, seed=0, dtype=torch.bfloat16)
    half.add(torch.ones(3, 2), torch.arange(3))
    assert half.rows().dtype == torch.bfloat16


def _part_of_the_rows(total: int, capacity: int) -> tuple:
    axis = mesh_of_processes().data
    reservoir = Reservoir(capacity, 2, seed=5)
    mine = torch.arange(total)[axis.rank :: axis.size]
    reservoir.add(_rows(mine), hash_keys(mine, mine, 2))
    before = reservoir.merged_rows(axis), reservoir.merged_keys(axis), reservoir.gathered_rows(axis)
    # One more batch, of which nothing enters on the first rank: its answer is not to come from memory.
    more = torch.arange(total, total + 200) if axis.rank == axis.size - 1 else torch.arange(0)
    reservoir.add(_rows(more), hash_keys(more, more, 2))
    choice = reservoir.selection.choose(axis)
    place = torch.stack([choice.place, reservoir.chosen_rows(choice)[:, 0].long()], dim=1)
    return *before, reservoir.gathered_rows(axis), place


@pytest.mark.parametrize("total", [500, 20])
def test_ranks_keep_together_what_one_would_keep(total: int) -> None:
    alone = Reservoir(50, 2, seed=5)
    alone.add(_rows(torch.arange(total)), hash_keys(torch.arange(total), torch.arange(total), 2))
    parts = spawn(_part_of_the_rows, 3, total, 50)
    assert sorted(torch.cat([p[0] for p in parts])[:, 0].tolist()) == sorted(alone.rows()[:, 0].tolist())
    assert sorted(torch.cat([p[1] for p in parts]).tolist()) == sorted(alone.keys().tolist())
    for _, _, everywhere, *_ in parts:
        assert torch.equal(everywhere, alone.rows())
    assert torch.equal(alone.merged_rows(ALONE), alone.rows())
    more = torch.arange(total, total + 200)
    alone.add(_rows(more), hash_keys(more, more, 2))
    for _, _, _, everywhere, _ in parts:
        assert torch.equal(everywhere, alone.rows())
    places = torch.cat([part[4] for part in parts])
    assert torch.equal(places[places[:, 0].argsort(), 1], alone.rows()[:, 0].long()), "each row knows its place"


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(MocteError, match="one key each"):
        Reservoir(4, 2, 0).add(torch.ones(3, 2), torch.arange(2))
    with pytest.raises(MocteError, match="one key each"):
        Reservoir(4, 2, 0).add(torch.ones(3, 5), torch.arange(3))
    with pytest.raises(MocteError, match="capacity"):
        Reservoir(0, 2, 0)


def _shares(ranks: int) -> tuple[torch.Tensor, int]:
    """Rows of this rank's part of a sample of 512 of 20,000 rows, and how many it keeps."""
    axis = mesh_of_processes().data
    indices = torch.arange(20_000)[axis.rank :: ranks]
    reservoir = Reservoir(512, 2, seed=5, ranks=ranks)
    reservoir.add(_rows(indices), hash_keys(indices, torch.zeros_like(indices), 1))
    half = reservoir.merged_rows(axis, count=256)
    return torch.cat([reservoir.gathered_rows(axis), torch.full((1, 2), float(len(half)))]), len(reservoir.rows())


def test_many_ranks_keep_little_each_and_the_same_sample() -> None:
    (whole, alone), *_ = spawn(_shares, 1, 1, timeout=60)
    assert alone == 512 and whole[-1, 0] == 256
    found = spawn(_shares, 4, 4, timeout=90)
    assert sum(int(rows[-1, 0]) for rows, _ in found) == 256
    for rows, kept in found:
        assert torch.equal(rows[:-1], whole[:-1])
        assert kept == 512  # 4 * 128 + 64, at most the capacity
    assert Reservoir(8192, 2, 0, ranks=64).selection.room == 576


def test_a_rank_that_is_full_shrinks_the_sample_but_does_not_change_it() -> None:
    """One rank alone gets all rows, though the room was meant for a fair part."""
    indices = torch.arange(20_000)
    keys = hash_keys(indices, torch.zeros_like(indices), 1)
    whole, crowded = Reservoir(4096, 2, seed=5), Reservoir(4096, 2, seed=5, ranks=64)
    whole.add(_rows(indices), keys)
    crowded.add(_rows(indices), keys)
    assert len(crowded.merged_rows(ALONE)) == crowded.selection.room == 320
    assert torch.equal(crowded.merged_rows(ALONE), whole.rows()[:320])
    smaller = whole.merged_rows(ALONE, count=100)
    assert torch.equal(smaller, whole.rows()[:100]), "a smaller sample is the beginning of the larger one"
