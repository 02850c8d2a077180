"""Whether gradients agree: the coherence of an expert's tokens, and the conflict between groups of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.errors import MocteError

# Shapes: n rows, G groups. K is (n, n), K_ij = <g_i, g_j> (ghost_gram); docs/method.md, section 5.

# A Gram matrix has |K_ij| <= sqrt(K_ii K_jj). By more than this it may not be off: the rounding of bf16.
_ROUNDING = 0.02


@dataclass(frozen=True)
class Conflict:
    """What :func:`conflict` found."""

    groups: tuple[int, ...]
    """Labels of the G groups that count, in rising order: the order of everything below."""
    sizes: tuple[int, ...]
    """Rows of each that count."""
    cosine: Tensor
    """(G, G) float64 cosine between the groups' mean gradients, on the CPU; NaN where one of them is zero."""
    mean_cosine: float
    """Mean cosine over the pairs of groups; NaN if no pair has one."""
    negative: float
    """Share of pairs whose mean gradients are opposed, of those that have a cosine; NaN where none has."""
    ratio: float
    """R = |mean gradient|^2 / mean square of the gradients, all rows: 1 all equal, 1/n orthogonal, 0 they cancel."""
    alignment: float
    """R of the groups' mean gradients m_c, |sum p_c m_c|^2 / sum p_c |m_c|^2: 1 all equal, 1/G orthogonal and of the
    same size, 0 they cancel; NaN where all m_c are zero. R is this times sum p_c |m_c|^2 / mean square."""
    kappa: tuple[float, ...]
    """Coherence of each group."""
    kappa_mixed: float
    """Coherence of mixtures of the groups, as many and as large as the groups."""
    q: float
    """Q = 1 - kappa_mixed / sum p_c kappa_c, p_c the groups' shares: 0 where the groups do not matter, 1 - 1/G where
    each has a direction of its own. It may come out negative. Opposite gradients count as equal: see the cosine."""


def coherence(k: Tensor) -> float:
    """kappa = lambda_max(N) / n, N_ij = K_ij / sqrt(K_ii K_jj): how far the rows' gradients share one direction.

    It is the mean of cos^2(g_i, u) over the rows, with the direction u that suits them best: 1 where all are parallel
    or opposite, 1/n where they are orthogonal. Without the normalisation a few large rows decide: lambda_max(K) / n
    grows with the square of a row's gradient, kappa does not move.

    Args:
        k: (n, n) Gram matrix. Rows without a gradient (K_ii zero, or under the smallest normal number of K's precision,
            where no digits are left) have no direction: they are left out, and n counts the others.

    Returns:
        A number in [1/n, 1]. Cost: one eigvalsh in fp64 on the CPU.

    Raises:
        MocteError: K is not a matrix of finite numbers, is not a Gram matrix, or has no row with a gradient.
    """
    normal, _, rows = _normalised(k)
    if not len(rows):
        raise MocteError(f"coherence needs a row with a gradient, and none of {k.shape[0]} has one.")
    return _top_share(normal)


def conflict(k: Tensor, groups: Tensor, unbiased: bool = False) -> Conflict:
    """How much groups of tokens (clusters, domains) pull an expert's weights in different directions.

    The block mean M_cd of K is the inner product of the mean gradients m_c and m_d, so everything follows from K:

        cosine_cd = M_cd / sqrt(M_cc M_dd)        R = sum_ij K_ij / n^2 / (sum_i K_ii / n)

    kappa depends on the number of rows (its floor is 1/n), so kappa_mixed is not that of all rows together, which would
    show a Q of 1 - 1/G for gradients without any structure: it is the mean, weighted by size, over mixtures that are as
    large as the groups. Each row is in one of them, and all groups have their shares in each, as far as sizes allow.

    M_cc also holds every row's product with itself, about v / n_c, v the rows' variance: cosines and R depend on sample
    sizes, and two random halves have the cosine |m|^2 / (|m|^2 + v / n_c), not 1. That is right for the mean
    gradients of these rows, and fair between runs at the same sizes, or with a random partition as the control.
    ``unbiased`` leaves rows' products with themselves out of M_cc and R, and so estimates those of the population. It
    costs noise: |cosine| may exceed 1, R may be negative, and a group whose M_cc is not positive has no cosine. Rows
    must then be independent; tokens of one document are not.

    Args:
        k: (n, n) Gram matrix of gradients of single rows.
        groups: (n,) integer group of each row; negative: none, left out.
        unbiased: see above. Changes cosine, mean_cosine, negative, ratio and alignment.

    Returns:
        Numbers of the rows that count: those with a gradient (see :func:`coherence`), in groups that have at
        least 2 of them. A common factor of all gradients changes none of them.

    Raises:
        MocteError: K as for :func:`coherence`; groups are not n integers; fewer than two groups of 2 rows with a
            gradient.
    """
    normal, squares, rows = _normalised(k)
    if groups.shape != k.shape[:1] or groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise MocteError(
            f"groups must be one integer for each of the {k.shape[0]} rows of K, not {tuple(groups.shape)} "
            f"{groups.dtype}."
        )
    labels = groups.detach().cpu()[rows]
    names, counts = torch.unique(labels[labels >= 0], return_counts=True)
    names, sizes = names[counts >= 2], counts[counts >= 2]
    if len(names) < 2:
        raise MocteError(
            "conflict is between groups: two of at least 2 rows with a gradient are needed, "
            f"and there are {len(names)}."
        )
    # Rows that count, group after group.
    order = torch.cat([(labels == name).nonzero()[:, 0] for name in names])
    normal, squares = normal[order[:, None], order], squares[order]
    scale = squares.sqrt()
    gram = normal * scale[:, None] * scale

    shares = sizes.double() / len(order)
    member = torch.repeat_interleave(torch.eye(len(names), dtype=torch.float64), sizes, dim=0) / sizes
    means = member.T @ gram @ member
    own_products = (member.square() * squares[:, None]).sum(0)
    ratio = gram.mean() / squares.mean()
    if unbiased:
        n, n_c = len(order), sizes.double()
        means.diagonal().copy_((means.diagonal() - own_products) * n_c / (n_c - 1))
        ratio = (n * ratio - 1) / (n - 1)
    # What rounding leaves of mean gradients that cancel is not a direction.
    floor = torch.finfo(k.dtype).eps * own_products * sizes
    cosine = _cosines(means, floor, clamp=not unbiased)
    pairs = cosine[tuple(torch.triu_indices(len(names), len(names), 1))]
    pairs = pairs[~pairs.isnan()]
    within = float(shares @ means.diagonal())

    kappa = [_top_share(part) for part in _diagonal_blocks(normal, sizes)]
    mixed_order = torch.argsort(_mixtures(sizes), stable=True)
    mixtures = _diagonal_blocks(normal[mixed_order[:, None], mixed_order], sizes)
    kappa_mixed = float(shares @ torch.tensor([_top_share(part) for part in mixtures], dtype=torch.float64))
    return Conflict(
        groups=tuple(names.tolist()),
        sizes=tuple(sizes.tolist()),
        cosine=cosine,
        mean_cosine=float(pairs.mean()),
        negative=float((pairs < 0).double().mean()),
        ratio=float(ratio),
        alignment=float(shares @ means @ shares) / within if within > float(shares @ floor) else float("nan"),
        kappa=tuple(kappa),
        kappa_mixed=kappa_mixed,
        q=1.0 - kappa_mixed / float(shares @ torch.tensor(kappa, dtype=torch.float64)),
    )


def _normalised(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows that have a gradient, in fp64 on the CPU: K with a unit diagonal, its diagonal, and their numbers."""
    if k.dim() != 2 or k.shape[0] != k.shape[1] or not k.shape[0] or not k.is_floating_point():
        raise MocteError(f"K must be a Gram matrix (n, n), n of 1 or more, not {tuple(k.shape)} {k.dtype}.")
    wide = k.detach().cpu().double()
    if not bool(torch.isfinite(wide).all()):
        raise MocteError("gradients cannot be compared: some entries of K are NaN or infinite.")
    squares = wide.diagonal()
    rows = (squares >= torch.finfo(k.dtype).tiny).nonzero()[:, 0]
    scale = squares[rows].sqrt()
    normal = wide[rows[:, None], rows] / scale[:, None] / scale
    too_large = bool((normal.abs() > 1.0 + _ROUNDING).any())
    if bool((squares < 0).any()) or too_large or bool(((normal - normal.T).abs() > _ROUNDING).any()):
        raise MocteError("K is not a Gram matrix: not symmetric, or some K_ii < 0 or |K_ij| > sqrt(K_ii K_jj).")
    return (normal + normal.T) / 2, squares[rows].clone(), rows


def _top_share(normal: Tensor) -> float:
    """Largest eigenvalue / n of a Gram matrix with a unit diagonal, within its bounds against rounding."""
    n = normal.shape[0]
    return min(1.0, max(1.0 / n, float(torch.linalg.eigvalsh(normal)[-1]) / n))


def _cosines(means: Tensor, floor: Tensor, clamp: bool) -> Tensor:
    squares = means.diagonal()
    length = torch.where(squares > floor, squares, float("nan")).sqrt()
    cosine = means / length[:, None] / length
    return cosine.clamp(-1.0, 1.0) if clamp else cosine


def _mixtures(sizes: Tensor) -> Tensor:
    """Mixture of each row, for rows sorted by group: mixtures of these sizes, each with rows of all groups."""
    # Every mixture takes rows at even distances, in turn with the others.
    places = torch.cat([(torch.arange(size, dtype=torch.float64) + 0.5) / size for size in sizes.tolist()])
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes)[torch.argsort(places, stable=True)]


def _diagonal_blocks(matrix: Tensor, sizes: Tensor) -> list[Tensor]:
    ends = sizes.cumsum(0).tolist()
    return [matrix[end - size : end, end - size : end] for size, end in zip(sizes.tolist(), ends, strict=True)]
