"""Says whether points fall into clusters, or whether one would only be cutting up a cloud."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mocte_ds.clusters.density import Neighbourhood, join_groups, local_dimension, separate_groups
from mocte_ds.clusters.valleys import LEAST_DIMENSION, joined_pieces
from mocte_ds.errors import MocteError

# By so many standard deviations an emptier region must be emptier than a cloud of constant density happens to be.
VALLEY = 4.0
# Clusters are looked for in all directions; where the points fill more dimensions than a curve or a plane, in the
# leading ones too, and along the lines between so many pieces: K clusters differ in K - 1 directions, and every other
# one adds the same noise to all distances.
DIRECTIONS, PIECES = (2, 3, 5), (2, 3, 4, 6, 8, 12, 16)
EPS_QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)
MIN_POINTS = 40
# Time and memory grow with the square of this; of more points every so many is looked at, the others follow these.
MOST_POINTS = 2048
METHODS = ("dbscan", "hdbscan")
# With one giant cluster in the radius of every point DBSCAN's time grows with the square of their number.
PUBLISHED_POINTS = 1024

# Shapes: n points, u different ones, r coordinates.


@dataclass(frozen=True)
class Detection:
    """What :func:`detect` found."""

    labels: Tensor
    """(n,) int64 cluster of each point, the largest cluster is 0; -1: noise, or in a cluster under the least mass."""
    count: int
    """Clusters of at least the least mass."""
    noise: float
    """Share of points in none of the clusters."""
    silhouette: float
    """Mean silhouette of the clustered points, in the directions that show them; 0 with fewer than two clusters."""
    found: bool
    """Whether the points fall into clusters by all rules."""
    largest: float
    """Share of points in the largest cluster, each noise point counted with the cluster nearest to it."""
    eps: float
    """Median distance of the points to their k-th neighbour, in the units of the points."""
    reason: str
    """One sentence: why clusters were found or not."""
    sensitivity: tuple[tuple[float, int], ...]
    """(quantile of the distance to the k-th neighbour, number of DBSCAN's clusters with that radius), for the log."""
    directions: int = 0
    """Number of leading directions that show the clusters."""


@dataclass(frozen=True)
class _Candidate:
    """One clustering on its way through the rules; ``passed`` counts the rules that it has met."""

    labels: np.ndarray
    """(u,)"""
    count: int
    noise: float
    largest: float
    eps: float
    directions: int
    silhouette: float = 0.0
    passed: int = 0
    reason: str = ""


@dataclass(frozen=True)
class _Rules:
    min_silhouette: float
    min_mass: float
    max_largest: float
    max_noise: float


def detect(
    z: Tensor,
    min_silhouette: float = 0.35,
    min_mass: float = 0.02,
    max_largest: float = 0.6,
    max_noise: float = 0.5,
    method: str = "dbscan",
) -> Detection:
    """Look for clusters; a cloud without structure, or one giant cluster with crumbs, is "not found".

    Rules (docs/method.md, section 3): at least two clusters of ``min_mass``, an emptier region between them (VALLEY
    above), the largest under ``max_largest``, noise at most ``max_noise``, silhouette at least ``min_silhouette``. They
    are looked for in several numbers of leading directions of the points; the number that shows most clusters counts,
    the largest of several. Deterministic; turning, mirroring or scaling the points, or their order, change nothing.

    Args:
        z: (n, r) coordinates, document means in the leading singular directions. Their scale does not matter.
        min_silhouette: alpha_c.
        min_mass: least share of points of a cluster that counts.
        max_largest: share that the largest cluster must stay under.
        max_noise: largest share of points in no cluster.
        method: `dbscan` (all radii at once) or `hdbscan` (its clusters, joined where no emptier region is between).

    Raises:
        MocteError: coordinates that are not finite or not a matrix, or another method.
    """
    if method not in METHODS:
        raise MocteError(f"clusters.method = {method!r} is not one of {list(METHODS)}.")
    points = _points(z)
    n, rules = len(points), _Rules(min_silhouette, min_mass, max_largest, max_noise)
    # Equal points are one point of more mass: copies of a document say nothing of the density around it.
    different, place, copies = _different(points)
    spread = float(np.sqrt(points.var(axis=0).sum())) if n else 0.0
    if n < MIN_POINTS or len(different) < MIN_POINTS or spread == 0.0:
        few = f"{n} points are too few" if n < MIN_POINTS else f"of {n} points {len(different)} differ, too few"
        why = f"{few} (at least {MIN_POINTS})" if n < MIN_POINTS or len(different) > 1 else "all points are equal"
        none = _Candidate(np.full(len(different), -1), 0, 1.0, 0.0, 0.0, 0, reason=why)
        return _report(none, False, (), place)
    some = np.linspace(0, len(different) - 1, min(len(different), MOST_POINTS)).astype(int)
    follows = _nearest(different[some], different) if len(some) < len(different) else some
    mass = np.bincount(follows, weights=copies, minlength=len(some))
    looked_at = _leading(different[some] / spread, mass)
    neighbours = max(8, len(some) // 64)
    least = max(float(neighbours), min_mass * n)
    near = Neighbourhood.of(_between(looked_at), neighbours)
    sensitivity = tuple(zip(EPS_QUANTILES, near.counts(EPS_QUANTILES, mass, least), strict=True))
    tried = []
    for labels, view in _clusterings(looked_at, near, mass, least, method):
        tried.append(_judge(_candidate(labels, view, mass, least, float(np.median(near.reach))), view, rules))
    good = [c for c in tried if not c.reason]
    best = max(good, key=lambda c: (c.count, c.directions)) if good else max(tried, key=lambda c: c.passed)
    why = f"{best.count} clusters, silhouette {best.silhouette:.2f}, noise {best.noise:.0%}" if good else best.reason
    best = replace(best, labels=best.labels[follows], reason=why, eps=best.eps * spread)
    return _report(best, bool(good), sensitivity, place)


def _different(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows (u, r), in their order; (n,) which of them each row is; (u,) copies of each."""
    _, first, place, copies = np.unique(points, axis=0, return_index=True, return_inverse=True, return_counts=True)
    order = first.argsort()
    return points[first[order]], order.argsort()[place.reshape(-1)], copies[order]


def _leading(points: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """(u, r) the points in their own principal directions, the leading one first.

    Points far outside count as if they lay at three times the median distance, so that a few do not choose them.
    """
    centred = points - np.median(points, axis=0)
    distance = np.linalg.norm(centred, axis=1)
    near = centred * np.minimum(1.0, 3 * np.median(distance) / np.maximum(distance, 1e-300))[:, None]
    near = near - np.average(near, axis=0, weights=mass)
    _, turn = np.linalg.eigh((near * mass[:, None]).T @ near)
    return centred @ turn[:, ::-1]


def _clusterings(
    points: np.ndarray, near: Neighbourhood, mass: np.ndarray, least: float, method: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Clusterings of points (u, r) to judge, each with the directions (u, k) that show it."""
    width, neighbours = points.shape[1], near.nearest.shape[1]
    wide = local_dimension(near.nearest) > LEAST_DIMENSION
    for directions in (*[k for k in DIRECTIONS if k < width and wide], width):
        view = points[:, :directions]
        there = near if directions == width else Neighbourhood.of(_between(view), neighbours)
        if method == "hdbscan":
            from sklearn.cluster import HDBSCAN

            found = HDBSCAN(min_cluster_size=max(2, math.ceil(least)), min_samples=neighbours, copy=True)
            yield join_groups(there, found.fit_predict(view), VALLEY), view
        else:
            yield separate_groups(there, mass, least, VALLEY), view
    for labels in joined_pieces(points, mass, PIECES, VALLEY) if wide else ():
        centres = np.stack([points[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
        span = np.linalg.svd(centres - centres.mean(axis=0), full_matrices=False)[2][: len(centres) - 1]
        yield labels, points @ span.T


def _between(points: np.ndarray) -> np.ndarray:
    """(u, u) distances."""
    from scipy.spatial.distance import cdist

    return cdist(points, points)


def _nearest(some: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n,) row of ``some`` that is nearest to each point."""
    parts = np.array_split(points, math.ceil(len(points) / MOST_POINTS))
    half = np.square(some).sum(1) / 2
    return np.concatenate([(half - part @ some.T).argmin(axis=1) for part in parts])


def published_line(z: Tensor) -> dict[str, float]:
    """The published rule on single tokens: DBSCAN with eps .30 on coordinates scaled to [-1, 1].

    For the log only: at token level it gives one giant cluster with crumbs (docs/method.md, section 3).

    Args:
        z: (n, r) coordinates; of more than a thousand, an even subsample is looked at.

    Returns:
        "clusters" (of at least 2 % of the points), "noise" (share of points in none) and "largest" (share of points).

    Raises:
        MocteError: coordinates that are not finite or not a matrix.
    """
    points = _points(z)
    if len(points) < MIN_POINTS:
        return {"clusters": 0, "noise": 1.0, "largest": 0.0}
    points = points[:: math.ceil(len(points) / PUBLISHED_POINTS)]
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = 2 * (points - low) / np.where(high > low, high - low, 1.0) - 1
    from sklearn.cluster import DBSCAN

    labels = DBSCAN(eps=0.3, min_samples=max(8, len(points) // 150)).fit_predict(scaled)
    sizes = np.bincount(labels[labels >= 0], minlength=1) / len(points)
    kept = sizes[sizes >= 0.02]
    return {"clusters": len(kept), "noise": float(1.0 - kept.sum()), "largest": float(sizes.max())}


def _points(z: Tensor) -> np.ndarray:
    z = torch.as_tensor(z)
    if z.dim() != 2:
        raise MocteError(
            f"clusters are looked for in a matrix (points, coordinates), not in a tensor {tuple(z.shape)}."
        )
    points = z.detach().double().cpu().numpy()
    if not np.isfinite(points).all():
        raise MocteError("clusters cannot be looked for: some coordinates are NaN or infinite.")
    return points


def _candidate(labels: np.ndarray, view: np.ndarray, mass: np.ndarray, least: float, eps: float) -> _Candidate:
    """Clusters under the least mass become noise; the rest are numbered by size."""
    sizes = np.bincount(labels[labels >= 0], weights=mass[labels >= 0], minlength=1)
    kept = [k for k in np.argsort(-sizes, kind="stable") if sizes[k] >= least]
    renamed = np.full(len(labels), -1)
    for new, old in enumerate(kept):
        renamed[labels == old] = new
    lost, members = renamed < 0, renamed >= 0
    completed = renamed.copy()
    if len(kept) >= 2 and lost.any():
        # Much noise around a giant cluster must not make it look small.
        completed[lost] = renamed[members][_nearest(view[members], view[lost])]
    held = np.bincount(completed[completed >= 0], weights=mass[completed >= 0], minlength=1)
    noise, largest = float(mass[lost].sum() / mass.sum()), float(held.max() / mass.sum())
    return _Candidate(renamed, len(kept), noise, largest, eps, view.shape[1])


def _judge(c: _Candidate, view: np.ndarray, rules: _Rules) -> _Candidate:
    """The candidate with its silhouette and, if a rule is broken, the reason."""
    if c.count < 2:
        held = f"one counts if it holds {rules.min_mass:.0%} of the points"
        return replace(c, passed=0, reason=f"{c.count} of the two clusters needed; {held}")
    if c.largest >= rules.max_largest:
        held = f"one cluster holds {c.largest:.0%} of the points; it must hold less than {rules.max_largest:.0%}"
        return replace(c, passed=1, reason=held)
    if c.noise > rules.max_noise:
        noise = f"{c.noise:.0%} of the points are noise; at most {rules.max_noise:.0%} may be"
        return replace(c, passed=2, reason=noise)
    silhouette = _silhouette(view, c.labels)
    if silhouette < rules.min_silhouette:
        under = f"silhouette {silhouette:.2f} is under {rules.min_silhouette:.2f}"
        return replace(c, passed=3, silhouette=silhouette, reason=under)
    return replace(c, passed=4, silhouette=silhouette)


def _silhouette(view: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw, 1987) of the clustered points; a point that is alone in its cluster counts 0."""
    members = np.flatnonzero(labels >= 0)
    labels = labels[members]
    of_cluster = np.eye(labels.max() + 1)[labels]
    sums, sizes = _between(view[members]) @ of_cluster, of_cluster.sum(axis=0)
    row = np.arange(len(labels))
    inside = sums[row, labels] / np.maximum(sizes[labels] - 1, 1)
    others = sums / sizes
    others[row, labels] = np.inf
    outside = others.min(axis=1)
    score = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-300)
    return float(np.where(sizes[labels] > 1, score, 0.0).mean())


def _report(c: _Candidate, found: bool, sensitivity: tuple[tuple[float, int], ...], place: np.ndarray) -> Detection:
    labels = torch.from_numpy(np.asarray(c.labels[place], dtype=np.int64))
    return Detection(
        labels, c.count, c.noise, c.silhouette, found, c.largest, c.eps, c.reason, sensitivity, c.directions
    )
