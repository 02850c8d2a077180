"""Bounds on sampled directions, against numpy and against samples of Gaussian rows."""

import math

import numpy as np
import pytest
import torch

from mocte_ds.errors import MocteError
from mocte_ds.spectrum.bounds import (
    covariance,
    davis_kahan,
    effective_rank,
    first_order_sine,
    koltchinskii_lounici,
    leading,
)
from mocte_ds.spectrum.subspace import sine_of_largest_angle

SCALES = np.array([5.0, 4.0, 3.0, 1.0, 0.9, 0.8, 0.7, 0.6])
VALUES = torch.from_numpy(SCALES**2)


def gaussian(rows: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, len(SCALES))) * SCALES)


def test_covariance_and_its_directions_are_numpys() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 6)) * np.arange(1, 7) + 9)
    found = covariance(rows.float())
    assert np.allclose(found, np.cov(rows.numpy(), rowvar=False, ddof=0), rtol=1e-5)
    values, vectors = leading(found)
    assert np.allclose(values, np.linalg.eigvalsh(found.numpy())[::-1])
    assert torch.allclose(found @ vectors, vectors * values, atol=1e-8)


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    share = np.array([0.5, 0.25, 0.25])
    assert effective_rank(torch.from_numpy(8 * share)) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_bound_of_davis_and_kahan_holds_and_is_not_empty() -> None:
    spectrum = torch.diag(VALUES)
    own = leading(spectrum)[1]
    bounds = []
    for seed in range(20):
        found = covariance(gaussian(2000, seed))
        deviation = float(np.linalg.norm((found - spectrum).numpy(), ord=2))
        bounds.append(davis_kahan(deviation, VALUES, 3))
        assert float(sine_of_largest_angle(own[:, :3], leading(found)[1][:, :3])) <= bounds[-1]
    assert max(bounds) < 1
    assert davis_kahan(1.0, VALUES, 3) == pytest.approx(2 / 8) and davis_kahan(100.0, VALUES, 3) == 1
    assert davis_kahan(1e-9, torch.ones(4), 2) == 1, "without a gap nothing is bounded"


def test_gaussian_rows_are_as_far_off_as_the_laws_say() -> None:
    own, rows = torch.eye(len(SCALES), dtype=torch.float64), 1000
    squares, deviations = [], []
    for seed in range(200):
        found = covariance(gaussian(rows, seed))
        sines = torch.linalg.matrix_norm(own[:, 3:].T @ leading(found)[1][:, :3])
        squares.append(float(sines) ** 2)
        deviations.append(float(np.linalg.norm((found - torch.diag(VALUES)).numpy(), ord=2)))
    assert math.sqrt(np.mean(squares)) == pytest.approx(first_order_sine(VALUES, 3, rows), rel=0.05)
    mean_norm = float(gaussian(100_000, 999).norm(dim=1).mean())
    # Up to a constant, which is between one and two here.
    assert 1 < np.mean(deviations) / koltchinskii_lounici(VALUES, mean_norm, rows) < 2
    assert koltchinskii_lounici(VALUES, mean_norm, 4 * rows) == pytest.approx(
        koltchinskii_lounici(VALUES, mean_norm, rows) / 2
    )
    assert koltchinskii_lounici(VALUES, mean_norm, 1) == pytest.approx(mean_norm**2)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_rank_that_leaves_nothing_out_is_refused(rank: int) -> None:
    with pytest.raises(MocteError, match="between 1 and 7"):
        davis_kahan(0.1, VALUES, rank)
    with pytest.raises(MocteError, match="between 1 and 7"):
        first_order_sine(VALUES, rank, 10)
