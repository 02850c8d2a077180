"""How far two labelings of the same points agree."""

import torch
from torch import Tensor

from mocte_ds.errors import MocteError


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
    from sklearn.metrics import adjusted_rand_score  # takes two seconds to import, which most commands need not wait

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
    from sklearn.metrics import normalized_mutual_info_score

    known = (labels >= 0) & (domains >= 0)
    labels, domains = labels[known], domains[known]
    if not labels.numel():
        return {"nmi": 0.0, "purity": 0.0}
    table = torch.zeros(int(labels.max()) + 1, int(domains.max()) + 1)
    table.index_put_((labels.cpu(), domains.cpu()), torch.ones(labels.numel()), accumulate=True)
    nmi = normalized_mutual_info_score(domains.cpu().numpy(), labels.cpu().numpy())
    return {"nmi": float(nmi), "purity": float(table.max(dim=1).values.sum() / labels.numel())}
