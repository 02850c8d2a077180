"""Dropout of experts: ranks that draw other amounts of numbers draw alike again afterwards."""

import torch

from mocte_ds.dist.mesh import Axis
from mocte_ds.dist.rank_draws import draws_of_rank


def _drawn(rank: int, amount: int, place: str = "block 3") -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank draws within, and after that."""
    torch.manual_seed(1)
    with draws_of_rank(Axis(None, rank, 2), place):
        inside = torch.rand(amount)
    return inside[:4], torch.rand(4)


def test_ranks_draw_alike_again_whatever_they_drew() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    for rank, amount in ((0, 4), (1, 9), (1, 0)):
        assert torch.equal(_drawn(rank, amount)[1], expected)


def test_draws_are_a_ranks_own_and_come_again() -> None:
    (first, after), (other, _), (elsewhere, _) = _drawn(0, 4), _drawn(1, 4), _drawn(0, 4, "block 4")
    assert torch.equal(_drawn(0, 4)[0], first)
    assert len({tuple(t.tolist()) for t in (first, after, other, elsewhere)}) == 4


def test_an_error_within_leaves_the_state_as_it_was() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    try:
        with draws_of_rank(Axis(None, 0, 2), ""):
            torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)
