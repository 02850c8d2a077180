"""Clusters that touch in their tails: pieces of k-means, joined wherever no valley lies between two of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mocte_ds.clusters.start import means, principal_pieces_by_count

_ITERATIONS = 30
# Of a cloud in few dimensions pieces may lie apart with nothing between them: the turns of a curve.
LEAST_DIMENSION = 3.0
# On the line between two pieces' centres, of length 1: width of a window, and where the valley is looked for.
_WINDOW, _VALLEYS = 0.3, (0.3, 0.4, 0.5, 0.6, 0.7)
# A valley holds at most this share of what the window at the emptier centre holds.
_DEPTH = 0.5
# Points that a piece needs to show a valley, over the significance squared; largest share of points in smaller ones.
_NEEDED, _MOST_SMALL = 3.0, 0.1

# Shapes: n points, r coordinates, K pieces.


def joined_pieces(
    points: np.ndarray, mass: np.ndarray, counts: Sequence[int], significance: float
) -> Iterator[np.ndarray]:
    """Groups of points between which density falls and rises again, seen along the line from centre to centre.

    Distances in many directions hide a valley in the noise of all of them; on the line between two centres one
    direction is left. Pieces of one cloud or curve have no valley to their neighbours, so they join, and a chain of
    neighbours joins with them (mixture components that are one mode; Hennig, "Methods for merging Gaussian mixture
    components", 2010).

    Args:
        points: (n, r).
        mass: (n,) of each point.
        counts: each K, pieces to begin with, ascending.
        significance: standard deviations by which a valley's count must fall below that at both centres.

    Yields:
        (n,) int64 group of each point, for each K; one group where the pieces are too small to tell.
    """
    z, w = torch.from_numpy(np.ascontiguousarray(points)), torch.from_numpy(mass.astype(float))
    for start in principal_pieces_by_count(z, w, counts, even=False):
        yield _joined(points, _pieces(z, w, start).numpy(), significance)


def _joined(points: np.ndarray, labels: np.ndarray, significance: float) -> np.ndarray:
    """(n,) groups of the pieces between which there is no valley."""
    count = int(labels.max()) + 1
    centres = np.stack([points[labels == k].mean(axis=0) for k in range(count)])
    large = np.bincount(labels, minlength=count) >= _NEEDED * significance**2
    if large.sum() < 2 or (~large[labels]).mean() > _MOST_SMALL:
        return np.zeros(len(points), dtype=np.int64)
    group, names = np.arange(count), np.flatnonzero(large).tolist()
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            between = points[(labels == a) | (labels == b) | ~large[labels]]
            if group[a] != group[b] and not _valley(between, centres[a], centres[b], significance):
                group[group == group[b]] = group[a]
    # A piece too small to show a valley follows the nearest large one; its points count in every valley.
    for k in np.flatnonzero(~large):
        group[k] = group[names[np.square(centres[names] - centres[k]).sum(axis=1).argmin()]]
    return np.unique(group, return_inverse=True)[1][labels]


def _pieces(z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n,) pieces 0 to K - 1 of k-means from those labels, none of them empty."""
    centroids = torch.zeros(int(labels.max()) + 1, z.shape[1], dtype=z.dtype)
    for _ in range(_ITERATIONS):
        centroids = means(z, w, labels, centroids)
        new = (2 * z @ centroids.T - centroids.square().sum(1)).argmax(dim=1)
        if torch.equal(new, labels):
            break
        labels = new
    return labels.unique(return_inverse=True)[1]


def _valley(points: np.ndarray, one: np.ndarray, other: np.ndarray, significance: float) -> bool:
    """Whether density falls between two centres, by the counts of points in windows on the line through them."""
    axis = other - one
    place = (points - one) @ axis / max(float(axis @ axis), 1e-300)

    def held(middle: float) -> int:
        return int((np.abs(place - middle) <= _WINDOW / 2).sum())

    side, valley = min(held(0.0), held(1.0)), min(held(middle) for middle in _VALLEYS)
    return bool(valley <= _DEPTH * side and side - valley >= significance * np.sqrt(max(side + valley, 1)))
