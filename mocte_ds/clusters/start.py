"""Where k-means starts: pieces of the points that depend on nothing but the points."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Shapes: n points, r coordinates, K pieces.


def principal_pieces(z: Tensor, w: Tensor, count: int, even: bool, generator: torch.Generator | None = None) -> Tensor:
    """Cut points into pieces along their principal directions, one piece into two at a time.

    The divisive start of k-means (Su & Dy, "A deterministic method for initializing K-means clustering", 2004). No
    order of rows enters, so that turned, mirrored or permuted points give the same pieces, and nearly equal points
    nearly the same.

    Args:
        z: (n, r) fp64, n >= K.
        w: (n,) mass of each point.
        count: K.
        even: True: pieces of equal mass; False: the piece with the largest scatter is cut at its mean.
        generator: of other starts, cut along random mixtures of the leading directions; None: along the first one.

    Returns:
        (n,) int64 piece of each point; fewer than K pieces where fewer points differ.
    """
    return principal_pieces_by_count(z, w, [count], even, generator)[0]


def principal_pieces_by_count(
    z: Tensor, w: Tensor, counts: Sequence[int], even: bool, generator: torch.Generator | None = None
) -> list[Tensor]:
    """:func:`principal_pieces` for ascending numbers of pieces: uneven cuts for few pieces are the first ones for many.

    Args:
        z: as there.
        w: as there.
        counts: ascending; one only if ``even``.
        even: as there.
        generator: as there.

    Returns:
        (n,) labels for each of ``counts``.
    """
    labels, found = torch.zeros(len(z), dtype=torch.int64), []
    waiting = [(_scatter(z, w), 0, counts[-1], torch.arange(len(z)))]
    pieces = 1
    for count in counts:
        while waiting and pieces < count:
            waiting.sort(key=lambda piece: (piece[0], -piece[1]))
            _, label, share, rows = waiting.pop()
            along = _projection(z[rows], w[rows], generator)
            if even:
                left, cut = _even_cut(along, w[rows], share)
            else:
                left, cut = along <= 0, 0
            if bool(left.all()) or not bool(left.any()):
                continue
            labels[rows[~left]] = pieces
            parts = ((label, cut if even else share, rows[left]), (pieces, share - cut if even else share, rows[~left]))
            for name, wanted, part in parts:
                if len(part) > 1 and wanted > 1:
                    waiting.append((_scatter(z[part], w[part]), name, wanted, part))
            pieces += 1
        found.append(labels.clone())
    return found


def means(z: Tensor, w: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """(K, r) centroids of the labelled points; a cluster without points keeps its old one."""
    sums = torch.zeros_like(old).index_add_(0, labels, z * w[:, None])
    load = torch.zeros(len(old), dtype=z.dtype).index_add_(0, labels, w)
    return torch.where(load[:, None] > 0, sums / load.clamp(min=1e-300)[:, None], old)


def _scatter(z: Tensor, w: Tensor) -> float:
    mean = (w[:, None] * z).sum(0) / w.sum().clamp(min=1e-300)
    return float((w * (z - mean).square().sum(1)).sum())


def _projection(z: Tensor, w: Tensor, generator: torch.Generator | None) -> Tensor:
    """(n,) place of each point along the leading principal direction, or a mixture of three; 0 for the mean."""
    centred = z - (w[:, None] * z).sum(0) / w.sum().clamp(min=1e-300)
    directions = torch.linalg.eigh((w[:, None] * centred).T @ centred).eigenvectors.flip(1)
    along = centred @ directions[:, : 1 if generator is None else 3]
    # A direction's own sign means nothing: the side with the longer tail is the right one.
    along = along * torch.where((w[:, None] * along**3).sum(0) < 0, -1.0, 1.0)
    if generator is None:
        return along[:, 0]
    return along @ torch.randn(3, generator=generator, dtype=z.dtype)[: along.shape[1]]


def _even_cut(along: Tensor, w: Tensor, share: int) -> tuple[Tensor, int]:
    """Which points lie left of a cut into floor(share / 2) parts and the rest, and the number of parts on the left."""
    left = share // 2
    ascending, order = along.sort(stable=True)
    before = w[order].cumsum(0)
    wanted = float(before[-1]) * left / share
    last = min(int((before <= wanted * (1 + 1e-9)).sum()), len(along) - 1)
    bound = (ascending[max(last - 1, 0)] + ascending[last]) / 2
    return along <= bound, left
