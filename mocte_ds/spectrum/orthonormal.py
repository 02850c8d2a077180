"""Orthonormal columns from any columns, even dependent or zero ones."""

import torch
from torch import Tensor

_LOSS = 1e-6  # largest accepted entry of Q^T Q - 1


def orthonormal_against(known: Tensor | None, y: Tensor) -> Tensor:
    """Orthonormal columns that, with ``known``, span ``known`` and ``y``.

    Cholesky QR done twice (Yamamoto et al., 2015): matrix products only. Where the columns are dependent, the Cholesky
    factor fails or orthogonality is lost, and Householder QR takes over, which completes the basis by any directions.

    Args:
        known: (L, d, m) orthonormal, fp64, or None.
        y: (L, d, q) fp64, m <= d.

    Returns:
        (L, d, q) fp64; if m + q > d only the first d - m columns are there.
    """
    if known is None or known.shape[-1] + y.shape[-1] <= y.shape[-2]:
        fast = _cholesky_qr2(known, y)
        if fast is not None:
            return fast
    together = y if known is None else torch.cat([known, _scaled(y)], dim=-1)
    first = 0 if known is None else known.shape[-1]
    return torch.linalg.qr(together.cpu()).Q[..., first:].to(y.device)


def _cholesky_qr2(known: Tensor | None, y: Tensor) -> Tensor | None:
    y = _scaled(y)
    for _ in range(2):
        if known is not None:
            y = y - known @ (known.mT @ y)
        factor, failed = torch.linalg.cholesky_ex(y.mT @ y, upper=True)
        if bool(failed.any()):
            return None
        y = torch.linalg.solve_triangular(factor, y, upper=True, left=False)
    everything = y if known is None else torch.cat([known, y], dim=-1)
    overlap = everything.mT @ y
    overlap.diagonal(offset=-(overlap.shape[-2] - overlap.shape[-1]), dim1=-2, dim2=-1).sub_(1.0)
    return y if bool(overlap.abs().amax() < _LOSS) else None


def _scaled(y: Tensor) -> Tensor:
    """Columns of length one (zero columns stay zero): the spectrum's spread must not look like dependence."""
    return y / y.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
