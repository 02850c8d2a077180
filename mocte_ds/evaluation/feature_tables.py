"""What a checkpoint's features are like by layer: spectrum, certificate, clusters; and how far a sample's are off."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mocte_ds.clusters import agreement, balanced_kmeans, detect
from mocte_ds.dist.mesh import ALONE
from mocte_ds.evaluation.features import Features
from mocte_ds.spectrum import certified_rank, sampled_svd, split_half_angles
from mocte_ds.spectrum.bounds import (
    covariance,
    davis_kahan,
    effective_rank,
    first_order_sine,
    koltchinskii_lounici,
    leading,
)
from mocte_ds.spectrum.subspace import sine_of_largest_angle
from mocte_ds.text_table import brief, text_table

RANK, CLUSTERS, DOCUMENTS, CERTIFIED_ROWS, MAX_ANGLE = 8, 8, 1024, 8192, 0.3
"""Directions, balanced clusters, sequences whose means are clustered, rows of the certificate, and its largest sine."""
COUNTS, REPEATS = (256, 512, 1024, 2048, 4096, 8192, 16384), 20

# Shapes: S sequences of T tokens, n rows, d features.


def feature_facts(features: Features, seed: int = 0) -> list[dict[str, Any]]:
    """Spectrum and clusters by layer.

    Args:
        features: of a checkpoint.
        seed: of the rows that the certificate is of, and of k-means.

    Returns:
        For each FFN and feature "module", "feature", "rows", "effective_rank" (:func:`effective_rank`), "leading"
        (share of the variance in RANK directions), "stable_rank" (variance over that of the first direction),
        "certificate" (sines by number of directions, between halves of CERTIFIED_ROWS rows drawn by chance),
        "certified_rank"; of the means of up to DOCUMENTS sequences "documents", "clusters", "silhouette" and "found"
        (:func:`detect`); and of CLUSTERS balanced clusters of them, against the domains, "nmi" and "purity".
    """
    facts = []
    generator = torch.Generator().manual_seed(seed)
    for (module, feature), found in features.rows.items():
        rows = found.flatten(0, 1)
        values = leading(covariance(rows))[0].clamp(min=0)
        rank = min(RANK, rows.shape[1] - 1)
        chosen = rows[torch.randint(len(rows), (min(CERTIFIED_ROWS, len(rows)),), generator=generator)]
        angles = split_half_angles(chosen, rank, ALONE).tolist()
        means, source = found[:DOCUMENTS].mean(dim=1), features.source[:DOCUMENTS]
        space = sampled_svd(means, rank, ALONE)
        points = (means - space.mean) @ space.basis
        seen = detect(points)
        facts.append(
            {
                "module": module,
                "feature": feature,
                "rows": len(rows),
                "effective_rank": effective_rank(values),
                "stable_rank": float(values.sum() / values[0]),
                "leading": float(values[:rank].sum() / values.sum()),
                "certificate": angles,
                "certified_rank": certified_rank(angles, MAX_ANGLE),
                "documents": len(means),
                "clusters": seen.count,
                "silhouette": seen.silhouette,
                "found": seen.found,
                **agreement(balanced_kmeans(points, CLUSTERS, seed).labels, source),
            }
        )
    return facts


def facts_text(facts: Sequence[dict[str, Any]]) -> str:
    """The facts as a table."""
    names = (
        "effective_rank",
        "stable_rank",
        "leading",
        "certified_rank",
        "clusters",
        "silhouette",
        "found",
        "nmi",
        "purity",
    )
    head = ["FFN", "feature", "effective rank", "stable rank", f"leading {RANK}", "certificate", "certified", "K"]
    head += ["silhouette", "found", "NMI", "purity"]
    rows = []
    for fact in facts:
        cells = [brief(fact[name]) for name in names]
        rows.append([fact["module"], fact["feature"], *cells[:3], brief(fact["certificate"][-1]), *cells[3:]])
    return text_table(head, rows, left=("FFN", "feature"))


def sampling_facts(
    features: Features, counts: Sequence[int] = COUNTS, repeats: int = REPEATS, seed: int = 0
) -> list[dict[str, Any]]:
    """How far a sample's directions are from those of all rows read, beside the certificate and what theory says.

    The rows read are the population: samples are drawn from them with replacement, so that its covariance is exactly
    known. They are drawn row by row (independent), and by sequence: all rows of whole sequences.

    Args:
        features: of a checkpoint.
        counts: numbers n of rows.
        repeats: samples of each size.
        seed: of the samples.

    Returns:
        For each FFN and feature, number of directions r, count and way of drawing: "module", "feature", "rank",
        "gap" (1 - lambda_(r+1) / lambda_r), "rows", "drawn" (`rows` or `sequences`); medians over the samples of the
        "sine" to the population, of the "certificate" (sine between the sample's halves) and of the "deviation",
        |S' - S| / |S|; "sine_over_certificate" (median), "worst" (the largest sine); bounds "davis_kahan" (with the
        median deviation) and "expected_bound" (with Koltchinskii and Lounici's), "expected_deviation" (theirs over
        |S|) and "first_order" (:func:`first_order_sine`).
    """
    facts = []
    for (module, feature), found in features.rows.items():
        rows = found.flatten(0, 1).double()
        population = covariance(rows)
        values, vectors = leading(population)
        mean_norm = float((rows - rows.mean(dim=0)).norm(dim=1).mean())
        ranks = range(1, min(RANK, rows.shape[1] - 1) + 1)
        for count in counts:
            for drawn, draw in (("rows", _rows_of), ("sequences", _sequences_of)):
                generator = torch.Generator().manual_seed(seed)
                samples = [
                    _sample(draw(found, count, generator).double(), population, vectors, ranks) for _ in range(repeats)
                ]
                sines, halves = torch.stack([s for s, _, _ in samples]), torch.stack([h for _, h, _ in samples])
                deviation = float(torch.tensor([d for _, _, d in samples]).median())
                expected = koltchinskii_lounici(values, mean_norm, count)
                for place, rank in enumerate(ranks):
                    sine, half = sines[:, place], halves[:, place]
                    facts.append(
                        {
                            "module": module,
                            "feature": feature,
                            "rank": rank,
                            "gap": float(1 - values[rank] / values[rank - 1]),
                            "rows": count,
                            "drawn": drawn,
                            "sine": float(sine.median()),
                            "worst": float(sine.max()),
                            "certificate": float(half.median()),
                            "sine_over_certificate": float((sine / half).median()),
                            "deviation": deviation / float(values[0]),
                            "davis_kahan": davis_kahan(deviation, values, rank),
                            "expected_deviation": expected / float(values[0]),
                            "expected_bound": davis_kahan(expected, values, rank),
                            "first_order": first_order_sine(values, rank, count),
                        }
                    )
    return facts


def sampling_text(facts: Sequence[dict[str, Any]]) -> str:
    """For each feature the facts of RANK directions and of the number, from 2 on, with the largest gap."""
    names = ["sine", "worst", "certificate", "sine_over_certificate", "deviation", "expected_deviation"]
    names += ["davis_kahan", "expected_bound", "first_order"]
    head = ["drawn", "rows n", "sine", "largest", "certificate", "sine / certificate", "|S'-S|/|S|", "expected"]
    head += ["Davis-Kahan", "with expected", "first order"]
    sections = []
    for module, feature in dict.fromkeys((f["module"], f["feature"]) for f in facts):
        mine = [f for f in facts if (f["module"], f["feature"]) == (module, feature)]
        gaps = {f["rank"]: f["gap"] for f in mine}
        widest = max((rank for rank in gaps if rank > 1), key=lambda rank: gaps[rank], default=1)
        for rank in sorted({widest, max(gaps)}):
            rows = [
                [f["drawn"], brief(f["rows"]), *(brief(f[name]) for name in names)] for f in mine if f["rank"] == rank
            ]
            title = f"{module}, {feature}: {rank} directions, gap {brief(gaps[rank])} of lambda_{rank}"
            sections.append(f"{title}\n" + text_table(head, rows, left=("drawn",)))
    return "\n\n".join(sections)


def _rows_of(found: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows = found.flatten(0, 1)
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def _sequences_of(found: Tensor, count: int, generator: torch.Generator) -> Tensor:
    length = found.shape[1]
    chosen = torch.randint(len(found), (-(-count // length),), generator=generator)
    return found[chosen].flatten(0, 1)[:count]


def _sample(rows: Tensor, population: Tensor, vectors: Tensor, ranks: range) -> tuple[Tensor, Tensor, float]:
    """Sines (r,) of a sample's leading directions to the population's, those between its halves, and |S' - S|."""
    matrix = covariance(rows)
    own = leading(matrix)[1]
    # Halves of neighbours, so that those of whole sequences are other sequences.
    one, other = (leading(covariance(half))[1] for half in rows.chunk(2))
    sines = torch.stack([sine_of_largest_angle(vectors[:, :k], own[:, :k]) for k in ranks])
    halves = torch.stack([sine_of_largest_angle(one[:, :k], other[:, :k]) for k in ranks])
    return sines, halves, float(torch.linalg.eigvalsh(matrix - population).abs().max())
