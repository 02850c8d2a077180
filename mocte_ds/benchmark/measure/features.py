"""Invented features with a mean, a few strong directions and clusters, as those of a model have."""

import torch
from torch import Tensor

_STRONG = 8


def planted_features(
    rows: int, d: int, clusters: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows around the centres of ``clusters`` clusters in eight strong directions, noise in all, and a large mean.

    Args:
        rows: n.
        d: features.
        clusters: number of centres.
        seed: the same seed gives the same rows on the same device.
        device: where they are made.
        dtype: how they are stored.

    Returns:
        (n, d) features and (n,) int64 clusters.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).normal_(generator=generator)

    strong = min(_STRONG, d)
    directions = normal(strong, d) * torch.linspace(2.0, 1.0, strong, device=device)[:, None]
    centres, mean = 1.5 * normal(clusters, strong), 3.0 * normal(d)
    label = torch.randint(clusters, (rows,), generator=generator, device=device)
    features = normal(rows, d)
    features.addmm_(centres[label] + 0.5 * normal(rows, strong), directions).add_(mean)
    return features.to(dtype), label
