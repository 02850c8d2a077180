"""How far the directions of a sample can be from those of all rows: bounds and a first-order law, from a covariance."""

import math

import torch
from torch import Tensor

from mocte_ds.errors import MocteError

# Shapes: d features. Eigenvalues are those of a covariance matrix, in descending order.


def covariance(rows: Tensor) -> Tensor:
    """(d, d) fp64 centred covariance, over n and not n - 1, of rows (n, d)."""
    rows = rows.double()
    centred = rows - rows.mean(dim=0)
    return centred.mT @ centred / len(rows)


def leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) of a symmetric (d, d) matrix, largest first, and its eigenvectors (d, d), a column each."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def effective_rank(values: Tensor) -> float:
    """How many directions the variance is spread over: exp of the entropy of the eigenvalues' shares, in [1, d].

    Roy and Vetterli, "The effective rank", 2007, with eigenvalues for singular values.
    """
    share = values.double().clamp(min=0)
    share = share / share.sum()
    return float(torch.exp(torch.special.entr(share).sum()))


def davis_kahan(deviation: float, values: Tensor, rank: int) -> float:
    """Bound on the sine between the leading ``rank`` directions of two covariances, at most 1.

    2 |S' - S| / (lambda_r - lambda_(r+1)): Davis and Kahan (1970) with Weyl's inequality.

    Args:
        deviation: |S' - S|, spectral norm.
        values: (d,) eigenvalues of S.
        rank: r, less than d.
    """
    gap = _gap(values, rank)
    return min(1.0, 2 * deviation / gap) if gap > 0 else 1.0


def koltchinskii_lounici(values: Tensor, mean_norm: float, rows: int) -> float:
    """What |S' - S| comes to for n independent Gaussian rows, up to a constant: |S| max(sqrt(k / n), k / n).

    k = (E|x|)^2 / |S| (Koltchinskii and Lounici, 2017, arXiv 1405.2468).

    Args:
        values: (d,) eigenvalues of S.
        mean_norm: E|x|, the mean length of a centred row.
        rows: n.
    """
    norm = float(values[0])
    k = mean_norm**2 / norm
    return norm * max(math.sqrt(k / rows), k / rows)


def first_order_sine(values: Tensor, rank: int, rows: int) -> float:
    """What the sine comes to for n independent Gaussian rows, to first order in 1 / sqrt(n); at most 1.

    The root of E |sin|_F^2 = (1/n) sum over i <= r < j of lambda_i lambda_j / (lambda_i - lambda_j)^2 (Anderson, 1963),
    all r principal angles together, so that the largest one alone lies under it.

    Args:
        values: (d,) eigenvalues of S.
        rank: r, less than d.
        rows: n.
    """
    _gap(values, rank)
    inside, outside = values[:rank, None].double(), values[None, rank:].double()
    terms = inside * outside / (inside - outside).square()
    return min(1.0, math.sqrt(float(terms.sum()) / rows))


def _gap(values: Tensor, rank: int) -> float:
    if not 1 <= rank < len(values):
        raise MocteError(f"rank = {rank} must lie between 1 and {len(values) - 1}: a subspace of all has no error.")
    return float(values[rank - 1] - values[rank])
