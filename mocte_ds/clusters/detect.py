"""Says whether points fall into clusters, or whether one would only be cutting up a cloud."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import DBSCAN, HDBSCAN
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from mocte_ds.errors import MocteError

# eps is tried at these quantiles of the distance to the min_samples-th neighbour. The median alone loses clusters that
# are smaller or wider than the others; the best of several is chosen by silhouette times coverage.
EPS_QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)
# Clusters must stay apart when eps grows by exp(VALLEY / (m sqrt(k))), m the local dimension, k = min_samples: the
# distance to the k-th neighbour varies by 1 / (m sqrt(k)) in a cloud of constant density, so pieces of such a cloud
# join again. Measured in these units, the pieces of 1,400 Gaussian, heavy-tailed and uniform clouds (1 to 8 dimensions,
# 60 to 400 points) joined by 2.1; planted clusters six standard deviations apart, at their best eps, held to 4.7.
VALLEY = 3.0
MIN_POINTS = 40
METHODS = ("dbscan", "hdbscan")
_SILHOUETTE_POINTS = 1000
# With one giant cluster in the radius of every point DBSCAN's time grows with the square of their number.
_PUBLISHED_POINTS = 1024


@dataclass(frozen=True)
class Detection:
    """What :func:`detect` found."""

    labels: Tensor
    """(n,) int64 cluster of each point, the largest cluster is 0; -1: noise, or in a cluster under the least mass."""
    count: int
    """Clusters of at least the least mass."""
    noise: float
    """Share of points in none of them."""
    silhouette: float
    """Mean silhouette of the clustered points; 0 with fewer than two clusters."""
    found: bool
    """True where the points fall into clusters by all rules."""
    largest: float
    """Share of points in the largest cluster, each noise point counted with the cluster nearest to it."""
    eps: float
    """Neighbourhood radius of DBSCAN, in the units of the points."""
    reason: str
    """One sentence: why found or not."""
    sensitivity: tuple[tuple[float, int], ...]
    """(quantile that eps was taken from, clusters found with it), for the log."""


@dataclass(frozen=True)
class _Candidate:
    """One clustering on its way through the rules; ``passed`` counts the rules behind it."""

    labels: np.ndarray
    count: int
    noise: float
    largest: float
    eps: float
    silhouette: float = 0.0
    passed: int = 0
    reason: str = ""

    @property
    def score(self) -> float:
        return self.silhouette * (1.0 - self.noise)


def detect(
    z: Tensor,
    min_silhouette: float = 0.35,
    min_mass: float = 0.02,
    max_largest: float = 0.6,
    max_noise: float = 0.5,
    method: str = "dbscan",
) -> Detection:
    """Look for clusters; a cloud without structure, or one giant cluster with crumbs, is "not found".

    Rules (docs/method.md, section 3): at least two clusters of ``min_mass``, the largest under ``max_largest``, noise
    at most ``max_noise``, silhouette at least ``min_silhouette``; and an emptier region between clusters (VALLEY
    above). Deterministic.

    Args:
        z: (n, r) coordinates, document means in the leading singular directions. Their scale does not matter.
        min_silhouette: alpha_c.
        min_mass: least share of points of a cluster that counts.
        max_largest: share that the largest cluster must stay under.
        max_noise: largest share of points in no cluster.
        method: `dbscan` (several radii, the best by silhouette times coverage) or `hdbscan` (no radius; for clusters of
            very different densities). The emptier region is asked for by DBSCAN in both.

    Raises:
        MocteError: coordinates that are not finite or not a matrix, or another method.
    """
    if method not in METHODS:
        raise MocteError(f"clusters.method = {method!r} is not one of {list(METHODS)}.")
    points = _points(z)
    n = len(points)
    spread = float(np.sqrt(points.var(axis=0).sum())) if n else 0.0
    if n < MIN_POINTS or spread == 0.0:
        why = f"{n} points are too few (at least {MIN_POINTS})" if n < MIN_POINTS else "all points are equal"
        return _report(_Candidate(np.full(n, -1), 0, 1.0, 0.0, 0.0, reason=why), False, ())
    points = points / spread
    neighbours = max(8, n // 150)
    distances = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors(points)[0]
    widened = math.exp(min(1.5, VALLEY / (_local_dimension(distances) * math.sqrt(neighbours))))

    def cluster(eps: float) -> _Candidate:
        labels = DBSCAN(eps=eps, min_samples=neighbours).fit_predict(points)
        return _candidate(points, labels, eps, min_mass)

    tried = []
    if method == "hdbscan":
        found = _by_density(points, distances[:, -1], min_mass)
        tried.append(_judge(points, found, min_silhouette, min_mass, max_largest, max_noise))
    for quantile in EPS_QUANTILES if method == "dbscan" else ():
        eps = max(float(np.quantile(distances[:, -1], quantile)), 1e-9)
        tried.append(_judge(points, cluster(eps), min_silhouette, min_mass, max_largest, max_noise))
        if np.bincount(tried[-1].labels + 1)[1:].max(initial=0) >= max_largest * n:
            break  # clusters only grow with eps
    by_radius = zip(EPS_QUANTILES, tried, strict=False) if method == "dbscan" else ()
    sensitivity = tuple((q, c.count) for q, c in by_radius)
    good = sorted((c for c in tried if not c.reason), key=lambda c: -c.score)
    for best in good:
        wider = cluster(best.eps * widened)
        if wider.count >= max(2, best.count / 2) and wider.largest < max_largest:
            why = f"{best.count} clusters, silhouette {best.silhouette:.2f}, noise {best.noise:.0%}"
            return _report(best, True, sensitivity, why, spread)
    if good:
        why = f"the {good[0].count} clusters join when eps grows by {widened - 1:.0%}: no emptier region between them"
        return _report(good[0], False, sensitivity, why, spread)
    furthest = max(tried, key=lambda c: c.passed)
    return _report(furthest, False, sensitivity, furthest.reason, spread)


def _by_density(points: np.ndarray, reach: np.ndarray, min_mass: float) -> _Candidate:
    """HDBSCAN's clusters; eps is the radius at which nearly all of their points are DBSCAN's core points.

    Args:
        points: (n, r).
        reach: (n,) distance to the min_samples-th neighbour.
        min_mass: least share of points of a cluster.
    """
    n, neighbours = len(points), max(8, len(points) // 150)
    size = max(neighbours, math.ceil(min_mass * n))
    labels = HDBSCAN(min_cluster_size=size, min_samples=neighbours, copy=True).fit_predict(points)
    members = reach[labels >= 0]
    eps = float(np.quantile(members, 0.95)) if len(members) else 0.0
    return _candidate(points, labels, max(eps, 1e-9), min_mass)


def published_line(z: Tensor) -> dict[str, float]:
    """What the published rule says of single tokens: DBSCAN with eps .30 on coordinates scaled to [-1, 1].

    For the log only: at token level it gives one giant cluster with crumbs (docs/method.md, section 3).

    Args:
        z: (n, r) coordinates; of more than a thousand every so many is looked at.

    Returns:
        "clusters" (of at least 2 % of the points), "noise" (share of points in none) and "largest" (share of points).

    Raises:
        MocteError: coordinates that are not finite or not a matrix.
    """
    points = _points(z)
    if len(points) < MIN_POINTS:
        return {"clusters": 0, "noise": 1.0, "largest": 0.0}
    points = points[:: math.ceil(len(points) / _PUBLISHED_POINTS)]
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = 2 * (points - low) / np.where(high > low, high - low, 1.0) - 1
    labels = DBSCAN(eps=0.3, min_samples=max(8, len(points) // 150)).fit_predict(scaled)
    sizes = np.bincount(labels[labels >= 0], minlength=1) / len(points)
    kept = sizes[sizes >= 0.02]
    return {"clusters": len(kept), "noise": float(1.0 - kept.sum()), "largest": float(sizes.max())}


def stability(labels_a: Tensor, labels_b: Tensor) -> float:
    """How far two labelings of the same points agree: adjusted Rand index, 1 for the same, 0 for chance.

    Args:
        labels_a: (n,) int64.
        labels_b: (n,) int64.

    Raises:
        MocteError: the labelings have different lengths.
    """
    if labels_a.shape != labels_b.shape:
        raise MocteError(
            f"labelings of {labels_a.numel()} and {labels_b.numel()} points cannot be compared; label the same points."
        )
    return float(adjusted_rand_score(labels_a.cpu().numpy(), labels_b.cpu().numpy()))


def agreement(labels: Tensor, domains: Tensor) -> dict[str, float]:
    """How far clusters agree with the sources of the points.

    Args:
        labels: (n,) int64 cluster, -1: none.
        domains: (n,) int64 source, -1: unknown.

    Returns:
        "nmi": normalised mutual information; "purity": share of points whose source is their cluster's most frequent
        one. Over points with a cluster and a known source; 0 where there is none.
    """
    known = (labels >= 0) & (domains >= 0)
    labels, domains = labels[known], domains[known]
    if not labels.numel():
        return {"nmi": 0.0, "purity": 0.0}
    table = torch.zeros(int(labels.max()) + 1, int(domains.max()) + 1)
    table.index_put_((labels.cpu(), domains.cpu()), torch.ones(labels.numel()), accumulate=True)
    nmi = normalized_mutual_info_score(domains.cpu().numpy(), labels.cpu().numpy())
    return {"nmi": float(nmi), "purity": float(table.max(dim=1).values.sum() / labels.numel())}


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


def _local_dimension(distances: np.ndarray) -> float:
    """Dimension in which the points fill space around them (Levina & Bickel, 2004, averaged as MacKay proposed).

    Args:
        distances: (n, k) ascending distances to the nearest neighbours, the point itself first.
    """
    inner, outer = distances[:, 1:-1], distances[:, -1:]
    usable = (inner > 0).all(axis=1)
    if not usable.any():
        return 1.0
    inverse = np.log(outer[usable] / inner[usable]).mean()
    neighbours = distances.shape[1] - 1
    return float(max(1.0, (neighbours - 2) / (neighbours - 1) / max(inverse, 1e-12)))


def _candidate(points: np.ndarray, labels: np.ndarray, eps: float, min_mass: float) -> _Candidate:
    """Clusters under the least mass become noise; the rest are numbered by size."""
    n = len(labels)
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    kept = [k for k in np.argsort(-sizes, kind="stable") if sizes[k] >= max(1.0, min_mass * n)]
    renamed = np.full(n, -1)
    for new, old in enumerate(kept):
        renamed[labels == old] = new
    lost, members = renamed < 0, renamed >= 0
    completed = renamed.copy()
    if len(kept) >= 2 and lost.any():
        # A small eps leaves most of a giant cluster as noise, which must not make it look small.
        nearest = NearestNeighbors(n_neighbors=1).fit(points[members]).kneighbors(points[lost])[1][:, 0]
        completed[lost] = renamed[members][nearest]
    largest = float(np.bincount(completed[completed >= 0], minlength=1).max()) / n
    return _Candidate(renamed, len(kept), float(lost.mean()), largest, eps)


def _judge(
    points: np.ndarray, c: _Candidate, min_silhouette: float, min_mass: float, max_largest: float, max_noise: float
) -> _Candidate:
    """The candidate with its silhouette and, if a rule is broken, the reason."""

    def failed(passed: int, reason: str, silhouette: float = 0.0) -> _Candidate:
        return _Candidate(c.labels, c.count, c.noise, c.largest, c.eps, silhouette, passed, reason)

    if c.count < 2:
        return failed(0, f"{c.count} of the two clusters needed; one counts if it holds {min_mass:.0%} of the points")
    if c.largest >= max_largest:
        return failed(1, f"one cluster holds {c.largest:.0%} of the points; it must hold less than {max_largest:.0%}")
    if c.noise > max_noise:
        return failed(2, f"{c.noise:.0%} of the points are noise; at most {max_noise:.0%} may be")
    silhouette = _silhouette(points, c.labels)
    if silhouette < min_silhouette:
        return failed(3, f"silhouette {silhouette:.2f} is under {min_silhouette:.2f}", silhouette)
    return failed(4, "", silhouette)


def _silhouette(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette of clustered points, of an even selection of them where there are many."""
    members = np.flatnonzero(labels >= 0)
    if len(members) > _SILHOUETTE_POINTS:
        members = members[np.linspace(0, len(members) - 1, _SILHOUETTE_POINTS).astype(int)]
    if len(np.unique(labels[members])) < 2:
        return 0.0
    return float(silhouette_score(points[members], labels[members]))


def _report(
    c: _Candidate, found: bool, sensitivity: tuple[tuple[float, int], ...], reason: str = "", spread: float = 1.0
) -> Detection:
    labels = torch.from_numpy(np.asarray(c.labels, dtype=np.int64))
    why = reason or c.reason
    return Detection(labels, c.count, c.noise, c.silhouette, found, c.largest, c.eps * spread, why, sensitivity)
