"""Coherence and conflict against planted directions and explicit mean gradients."""

import math

import pytest
import torch

from mocte_ds.errors import MocteError
from mocte_ds.trainability import coherence, conflict, ghost_gram
from tests.trainability.test_ghost import row_gradients
from tests.trainability.test_kernel import D, randomised, swiglu


def gram(g: torch.Tensor) -> torch.Tensor:
    return g @ g.T


def planted(directions: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and groups of rows that have their group's gradient (G, P) exactly, in shuffled order."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups))]
    return gram(directions.double()[groups]), groups


def noisy(n: int, P: int, mean: torch.Tensor | float = 0.0) -> torch.Tensor:
    return torch.randn(n, P, dtype=torch.float64) + mean


# Coherence


def test_coherence_of_equal_opposite_and_orthogonal_gradients() -> None:
    g = torch.randn(1, 20)
    assert coherence(gram(g.expand(7, 20))) == pytest.approx(1, abs=1e-6)
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1, 1])[:, None]
    assert coherence(gram(g * signs)) == pytest.approx(1, abs=1e-6)
    assert coherence(torch.eye(7)) == pytest.approx(1 / 7, abs=1e-6)
    assert coherence(torch.tensor([[3.0]])) == 1
    # Two directions, 6 and 2 rows: lambda_max / n = 6 / 8.
    assert coherence(planted(torch.eye(2), [6, 2])[0]) == pytest.approx(0.75)


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coherence_is_within_its_bounds_and_equals_the_explicit_one(n: int, dtype: torch.dtype) -> None:
    for mean in (0.0, 1.0, 100.0):
        g = noisy(n, 12, mean)
        kappa = coherence(gram(g).to(dtype))
        assert 1 / n <= kappa <= 1
        unit = g / g.norm(dim=1, keepdim=True)
        assert kappa == pytest.approx(float(torch.linalg.svdvals(unit)[0] ** 2) / n, rel=1e-5)


def test_coherence_does_not_see_how_large_single_rows_are() -> None:
    """8 rows of 64 times 50: lambda_max / n grows more than tenfold, kappa stays; on a real expert's K."""
    x, slopes = torch.randn(64, D), torch.randn(64, D)
    expert = randomised(swiglu())
    plain = ghost_gram(expert, x, slopes)
    slopes[:8] *= 50
    scaled = ghost_gram(expert, x, slopes)
    assert coherence(scaled) == pytest.approx(coherence(plain), rel=1e-4)
    ratio = float(torch.linalg.eigvalsh(scaled)[-1] / torch.linalg.eigvalsh(plain)[-1])
    assert ratio > 10
    assert coherence(plain * 1e-20) == pytest.approx(coherence(plain), rel=1e-4)


def test_rows_without_gradient_are_left_out_of_coherence() -> None:
    g = noisy(9, 12).float()
    expected = coherence(gram(g))
    with_zeros = torch.cat([torch.zeros(2, 12), g, torch.zeros(1, 12)])
    assert coherence(gram(with_zeros)) == pytest.approx(expected, rel=1e-6)
    with_zeros[0] = 1e-21  # its square has lost its digits in fp32
    assert coherence(gram(with_zeros)) == pytest.approx(expected, rel=1e-6)
    assert coherence(torch.diag(torch.tensor([0.0, 4.0]))) == 1


# Conflict: planted cases


def test_aligned_groups() -> None:
    k, groups = planted(torch.tensor([[1.0, 0], [2.0, 0], [5.0, 0]]), [4, 6, 8])
    found = conflict(k, groups)
    torch.testing.assert_close(found.cosine, torch.ones(3, 3, dtype=torch.float64))
    assert found.groups == (0, 1, 2) and found.sizes == (4, 6, 8)
    assert found.mean_cosine == pytest.approx(1) and found.negative == 0
    assert found.q == pytest.approx(0, abs=1e-9) and found.kappa == pytest.approx((1, 1, 1))
    # Lengths still differ: |mean|^2 / mean square of 4 ones, 6 twos and 8 fives.
    mean, square = (4 + 12 + 40) / 18, (4 + 24 + 200) / 18
    assert found.ratio == pytest.approx(mean**2 / square) and found.alignment == pytest.approx(mean**2 / square)
    same, groups = planted(torch.ones(2, 3), [5, 7])
    assert conflict(same, groups).ratio == pytest.approx(1)


def test_orthogonal_groups() -> None:
    k, groups = planted(torch.eye(4), [8, 8, 8, 8])
    found = conflict(k, groups)
    torch.testing.assert_close(found.cosine, torch.eye(4, dtype=torch.float64))
    assert found.mean_cosine == pytest.approx(0, abs=1e-12) and found.negative == 0
    assert found.ratio == pytest.approx(1 / 4) and found.alignment == pytest.approx(1 / 4)
    assert found.kappa_mixed == pytest.approx(1 / 4) and found.q == pytest.approx(3 / 4)


def test_opposed_groups() -> None:
    k, groups = planted(torch.tensor([[1.0, 1], [-1.0, -1]]), [6, 6])
    found = conflict(k, groups)
    torch.testing.assert_close(found.cosine, torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64))
    assert found.mean_cosine == pytest.approx(-1) and found.negative == 1
    assert found.ratio == pytest.approx(0, abs=1e-12) and found.alignment == pytest.approx(0, abs=1e-12)
    assert found.q == pytest.approx(0, abs=1e-9)  # blind to sign, as documented


def test_one_of_three_pairs_is_opposed() -> None:
    directions = torch.tensor([[1.0, 0], [0.6, 0.8], [-0.6, 0.8]])
    k, groups = planted(directions, [4, 4, 4])
    found = conflict(k, groups)
    expected = directions.double() @ directions.double().T
    torch.testing.assert_close(found.cosine, expected, atol=1e-6, rtol=0)
    assert found.negative == pytest.approx(1 / 3)
    assert found.mean_cosine == pytest.approx((0.6 - 0.6 + 0.28) / 3)


# Conflict: explicit mean gradients


@pytest.mark.parametrize("unbiased", [False, True])
def test_equals_explicit_mean_gradients_of_an_expert(unbiased: bool) -> None:
    expert, n = randomised(swiglu()), 40
    x, slopes = torch.randn(n, D) + 0.5, torch.randn(n, D) + 0.3
    groups = torch.randint(3, (n,)) * 5 - 2  # labels -2 (none), 3, 8
    g = row_gradients(expert, x, slopes)
    found = conflict(ghost_gram(expert, x, slopes), groups, unbiased=unbiased)
    parts = [g[groups == label] for label in (3, 8)]
    assert found.groups == (3, 8) and found.sizes == tuple(len(p) for p in parts)
    kept = torch.cat(parts)
    m = torch.stack([p.mean(0) for p in parts])
    p = torch.tensor([len(part) / len(kept) for part in parts], dtype=torch.float64)
    products, mean_square = m @ m.T, float(kept.square().sum(1).mean())
    square = float(kept.mean(0).square().sum())
    if unbiased:
        # U-statistics: means over ordered pairs of different rows.
        for c, part in enumerate(parts):
            pairs = gram(part)
            products[c, c] = (pairs.sum() - pairs.trace()) / (len(part) * (len(part) - 1))
        pairs = gram(kept)
        square = float(pairs.sum() - pairs.trace()) / (len(kept) * (len(kept) - 1))
    cosine = float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt())
    assert float(found.cosine[0, 1]) == pytest.approx(cosine, abs=1e-4)
    assert found.mean_cosine == pytest.approx(cosine, abs=1e-4)
    assert found.ratio == pytest.approx(square / mean_square, abs=1e-4)
    alignment = float(p @ products @ p) / float(p @ products.diagonal())
    assert found.alignment == pytest.approx(alignment, rel=1e-3)
    assert found.kappa == pytest.approx([coherence(gram(part)) for part in parts], rel=1e-4)
    within = sum(float(p[c]) * found.kappa[c] for c in range(2))
    assert found.q == pytest.approx(1 - found.kappa_mixed / within, abs=1e-9)


def test_a_common_factor_and_the_order_of_rows_change_nothing() -> None:
    k, groups = gram(noisy(30, 50, 0.3)), torch.arange(30) % 3
    k[groups == 1] *= 4
    k[:, groups == 1] *= 4
    plain, scaled = conflict(k, groups), conflict((k * 1e-12).float(), groups)
    assert scaled.mean_cosine == pytest.approx(plain.mean_cosine, abs=1e-6)
    assert (scaled.ratio, scaled.q) == pytest.approx((plain.ratio, plain.q), rel=1e-5)
    order = torch.randperm(30)
    moved = conflict(k[order[:, None], order], groups[order])
    assert (moved.mean_cosine, moved.ratio) == pytest.approx((plain.mean_cosine, plain.ratio), rel=1e-9)
    assert moved.kappa == pytest.approx(plain.kappa, rel=1e-9)


# Conflict: sampling


def test_random_groups_show_no_conflict_in_q() -> None:
    """Gradients with and without structure, groups at random and of unequal sizes: Q is near 0.

    A kappa_mixed of all rows together would give 1 - 1/G = .75 and more without structure.
    """
    for mean in (0.0, 0.5):
        groups = torch.repeat_interleave(torch.arange(4), torch.tensor([10, 20, 40, 80]))
        found = conflict(gram(noisy(150, 4000, mean)), groups)
        assert abs(found.q) < 0.05
    assert conflict(torch.eye(12), torch.arange(12) % 3).q == pytest.approx(0, abs=1e-12)


def test_every_group_has_its_share_in_each_mixture() -> None:
    """Orthogonal groups of unequal sizes: the best direction of a mixture is the largest group's, its share of it."""
    k, groups = planted(torch.eye(3), [40, 20, 20])
    found = conflict(k, groups)
    assert found.kappa_mixed == pytest.approx(0.5, abs=0.03)
    assert found.q == pytest.approx(0.5, abs=0.03)


def test_the_unbiased_form_is_right_on_average_where_the_plain_one_shrinks() -> None:
    """Groups of 16 rows, true cosine .6, as much noise as signal in a mean gradient of 16: plain .3, unbiased .6."""
    size, P, plain, unbiased, ratios = 16, 600, [], [], []
    means = torch.zeros(2, P, dtype=torch.float64)
    means[0, 0], means[1, 0], means[1, 1] = 1.0, 0.6, 0.8
    means *= (P / size) ** 0.5
    groups = torch.arange(2).repeat_interleave(size)
    for _ in range(40):
        k = gram(noisy(2 * size, P) + means[groups])
        plain.append(conflict(k, groups).mean_cosine)
        found = conflict(k, groups, unbiased=True)
        unbiased.append(found.mean_cosine)
        ratios.append(found.ratio)
    assert sum(plain) / 40 == pytest.approx(0.3, abs=0.05)
    assert sum(unbiased) / 40 == pytest.approx(0.6, abs=0.05)
    # |E g|^2 / E|g|^2: (1 + .6) / 2 of P / 16, over P + P / 16.
    assert sum(ratios) / 40 == pytest.approx(0.8 / 17, abs=0.005)


def test_groups_whose_mean_gradient_vanishes_have_no_cosine() -> None:
    g = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 1, 0], [0, -1, 1], [0, -1, 1]])
    found = conflict(gram(g), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert torch.isnan(found.cosine[0]).all() and torch.isnan(found.cosine[:, 0]).all()
    assert found.mean_cosine == pytest.approx(-(0.5**0.5)) and found.negative == 1


def test_what_rounding_leaves_of_a_mean_gradient_is_no_direction() -> None:
    """Three directions of a plane at 120 degrees, in fp32: entries of K cancel to about 1e-8, of either sign."""
    for shift in torch.linspace(0, 1, 20).tolist():
        angles = torch.tensor([0, 2, 4, 0.0, 0.0]) * math.pi / 3 + shift
        k = gram(torch.stack([angles.cos(), angles.sin()], 1))
        found = conflict(k, torch.tensor([0, 0, 0, 1, 1]))
        assert torch.isnan(found.cosine[0]).all() and float(found.cosine[1, 1]) == pytest.approx(1)
        assert math.isnan(found.mean_cosine) and math.isnan(found.negative)


def test_unbiased_estimates_leave_the_bounds() -> None:
    """|m_c|^2 = 1 - 1/4 in either group, <m_c, m_d> = 1; or |m_c|^2 = 1/4 - 1."""
    groups = torch.tensor([0, 0, 1, 1])
    g = torch.tensor([[1.0, 0.5, 0], [1, -0.5, 0], [1, 0, 0.5], [1, 0, -0.5]])
    found = conflict(gram(g), groups, unbiased=True)
    assert found.mean_cosine == pytest.approx(4 / 3) and float(found.cosine[0, 0]) == pytest.approx(1)
    assert conflict(gram(g), groups).mean_cosine == pytest.approx(1)
    found = conflict(gram(g * torch.tensor([0.5, 2, 2])), groups, unbiased=True)
    assert torch.isnan(found.cosine).all() and math.isnan(found.mean_cosine) and math.isnan(found.negative)
    assert math.isnan(found.alignment) and found.ratio < 0


def test_what_does_not_count() -> None:
    """Rows of no group, groups of one row, rows without gradient; the rest is as if they were not there."""
    g = noisy(12, 20, 0.4)
    groups = torch.tensor([4, 4, 4, 7, 7, 7, 7, 4, -1, 9, 5, 5])
    g[[2, 11]] = 0  # one of group 4, and one of the two of group 5
    counted = torch.tensor([0, 1, 7, 3, 4, 5, 6])
    found, alone = conflict(gram(g), groups), conflict(gram(g[counted]), groups[counted])
    assert found.groups == alone.groups == (4, 7) and found.sizes == alone.sizes == (3, 4)
    torch.testing.assert_close(found.cosine, alone.cosine)
    assert (found.ratio, found.alignment, found.q) == pytest.approx((alone.ratio, alone.alignment, alone.q))


# Refusals


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.zeros(0, 0), "n of 1 or more"),
        (torch.ones(2, 3), r"\(n, n\)"),
        (torch.ones(4), r"\(n, n\)"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0, 0], [0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, 0], [0, float("inf")]]), "NaN or infinite"),
        (torch.tensor([[1.0, 0.5], [0.2, 1]]), "not a Gram matrix"),
        (torch.tensor([[1.0, 2], [2, 1]]), "not a Gram matrix"),
        (torch.tensor([[1.0, 0], [0, -1]]), "not a Gram matrix"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(k: torch.Tensor, message: str) -> None:
    with pytest.raises(MocteError, match=message):
        coherence(k)
    with pytest.raises(MocteError, match=message):
        conflict(k, torch.zeros(k.shape[:1], dtype=torch.int64))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.tensor([0, 0, 1]), "one integer for each of the 4 rows"),
        (torch.tensor([[0, 0, 1, 1]]), "one integer for each of the 4 rows"),
        (torch.tensor([0.0, 0, 1, 1]), "one integer for each of the 4 rows"),
        (torch.tensor([0, 0, 0, 0]), "there are 1"),
        (torch.tensor([0, 0, 1, 2]), "there are 1"),
        (torch.tensor([-1, -1, 1, 1]), "there are 1"),
        (torch.tensor([0, 1, 2, 3]), "there are 0"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(groups: torch.Tensor, message: str) -> None:
    with pytest.raises(MocteError, match=message):
        conflict(torch.eye(4), groups)


def test_no_gradient_at_all_is_refused() -> None:
    with pytest.raises(MocteError, match="none of 3 has one"):
        coherence(torch.zeros(3, 3))
    with pytest.raises(MocteError, match="there are 0"):
        conflict(torch.zeros(4, 4), torch.tensor([0, 0, 1, 1]))
