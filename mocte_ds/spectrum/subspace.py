"""The leading singular directions of features that lie on many ranks, without gathering rows or forming X^T X."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.dist.collectives import from_rank_zero, gather_objects, sum_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError
from mocte_ds.spectrum.orthonormal import orthonormal_against

OVERSAMPLING = 8
# Measured on 4,096 rows, d = 1024: 5 cold passes bring singular values to 1 % even in white noise and directions of a
# k^-1/2 spectrum to .001 (3 passes: 3 % and .13). They happen once per block; later checks start warm.
COLD_PASSES = 5
# A warm start whose own directions move by more than STALE in the first pass gets MOVED_PASSES instead of one.
WARM_PASSES, MOVED_PASSES, STALE = 1, 3, 0.05

# Shapes: L layers (blocks), n rows of this rank, d features, r directions, q = r + 8 columns per pass, P passes.


@dataclass(frozen=True)
class Subspace:
    """Centred singular directions of the rows of all ranks; every shape has a leading (L,) if the input had layers."""

    mean: Tensor
    """(d,) mean of the rows."""
    basis: Tensor
    """(d, r) orthonormal; the directions turned onto the basis passed, so that coordinates keep their meaning."""
    singular_values: Tensor
    """(r,) of the centred matrix of all rows, descending; they belong to ``directions``."""
    directions: Tensor
    """(d, r) right singular vectors, largest singular value first; spans what ``basis`` spans."""
    explained: Tensor
    """(r,) share of the centred variance by direction."""
    rows: Tensor
    """() int64 number of rows, all ranks."""
    moved_bytes: int
    """Bytes that a rank sent in all-reduces for this result, all layers together."""


@torch.no_grad()
def sampled_svd(
    x: Tensor | Sequence[Tensor],
    rank: int,
    axis: Axis,
    basis: Tensor | None = None,
    passes: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Subspace:
    """Leading singular values and directions of the centred matrix of all ranks' rows (collective).

    Block power iteration Y = sum over ranks of X_p^T (X_p V), centred without forming X_p, one all-reduce per pass for
    all layers together; Rayleigh-Ritz over all passes' blocks, not only the last (block Krylov; Musco & Musco,
    "Randomized block Krylov methods", 2015), which costs no all-reduce and resolves flat spectra far better.

    Args:
        x: this rank's rows, (n, d), or (L, n, d), or a list of L matrices (n_l, d); n may be 0 and differ between
            ranks. Any floating dtype; the maths is fp32, sums of squares fp64.
        rank: r, directions wanted, at most d.
        axis: the ranks.
        basis: (d, r) or (L, d, r), the last result: a warm start, which the new basis is turned onto (Procrustes; left
            out if its r differs).
        passes: P; None: 5, with a basis 1, or 3 where the first pass shows that the basis has gone stale.
        seed: of the first random block; the same on all ranks.
        names: what errors call the layers; None: their numbers.

    Returns:
        The same subspace on every rank (rank zero's).

    Raises:
        MocteError: rank out of range, shapes that do not fit, no rows at all, or rows that are not finite.
    """
    layers = _as_layers(x)
    count, width = len(layers), layers[0].shape[1]
    if not 1 <= rank <= width:
        raise MocteError(f"sampled_svd: rank = {rank} must lie between 1 and the features' width {width}.")
    device = layers[0].device
    with torch.autocast(device.type, enabled=False):
        mean, total, rows = _moments(layers, axis, _names(names, count))
        start = _start(basis, rank, count, width, seed, device)
        known = 0 if basis is None else min(basis.shape[-1], start.shape[-1])
        blocks = _krylov(layers, mean, start, known, passes, axis)
        projected = torch.stack([_project(h, mu, q) for h, mu, q in zip(layers, mean, blocks, strict=True)])
        projected = sum_over_ranks(projected, axis)
        values, directions = _ritz(projected, blocks, rank)
    turned = directions if basis is None else _turn(directions, basis.reshape(count, width, -1))
    explained = values.square() / total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    values, explained = (t.to(device, torch.float32)[:, None] for t in (values, explained))
    # One rank's result is everybody's, so that ranks never diverge by rounding.
    packed = torch.cat([mean[:, None], turned.mT, directions.mT], dim=1)
    packed = from_rank_zero(torch.cat([packed.flatten(1), values.flatten(1), explained.flatten(1)], dim=1), axis)
    vectors, values, explained = packed.split([(2 * rank + 1) * width, rank, rank], dim=1)
    vectors = vectors.reshape(count, 2 * rank + 1, width)
    result = (
        vectors[:, 0].contiguous(),
        vectors[:, 1 : rank + 1].mT.contiguous(),
        values.contiguous(),
        vectors[:, rank + 1 :].mT.contiguous(),
        explained.contiguous(),
        rows,
    )
    columns = blocks.shape[2]
    moved = count * (8 * (width + 3) + 4 * width * (columns - start.shape[2]) + 8 * columns * columns)
    single = isinstance(x, Tensor) and x.dim() == 2
    return Subspace(*[t[0] if single else t for t in result], moved_bytes=moved)  # type: ignore[misc]


def split_half_certificate(x: Tensor | Sequence[Tensor], rank: int, axis: Axis, basis: Tensor | None = None) -> Tensor:
    """How far the sample determines the subspace: sine of the largest angle between two disjoint halves' (collective).

    Args:
        x: rows as for :func:`sampled_svd`, at least two over all ranks.
        rank: r.
        axis: the ranks.
        basis: warm start.

    Returns:
        () or (L,), in [0, 1]; method.md accepts up to 0.3.
    """
    return split_half_angles(x, rank, axis, basis)[..., -1]


def split_half_angles(
    x: Tensor | Sequence[Tensor],
    rank: int,
    axis: Axis,
    basis: Tensor | None = None,
    names: Sequence[str] | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """The certificate for each number of leading directions: (r,) or (L, r), entry k - 1 for the first k.

    Args: as for :func:`split_half_certificate`, ``names`` as for :func:`sampled_svd`, and
        place: (n,) place of each row of this rank, of every layer, among the rows of all ranks: odd and even ones are
            the halves, however the rows are shared out. None: the order of the ranks.
    """
    layers = _as_layers(x)
    if place is None:
        before = gather_objects([h.shape[0] for h in layers], axis)
        # Counted through, so that no half is empty for want of rows on one rank.
        first = [sum(counts[i] for counts in before[: axis.rank]) for i in range(len(layers))]
        places = [start + torch.arange(h.shape[0], device=h.device) for h, start in zip(layers, first, strict=True)]
    else:
        places = [place.to(h.device) for h in layers]
    halves = [h[at % 2 == half] for half in (0, 1) for h, at in zip(layers, places, strict=True)]
    if basis is not None:
        basis = basis.reshape(len(layers), layers[0].shape[1], -1).repeat(2, 1, 1)
    directions = sampled_svd(halves, rank, axis, basis, names=2 * _names(names, len(layers))).directions
    one, other = directions.split(len(layers))
    angles = [sine_of_largest_angle(one[..., :k], other[..., :k]) for k in range(1, rank + 1)]
    result = torch.stack(angles, dim=-1)
    return result[0] if isinstance(x, Tensor) and x.dim() == 2 else result


def sine_of_largest_angle(one: Tensor, other: Tensor) -> Tensor:
    """Sine of the largest principal angle between the spans of orthonormal (..., d, r) bases: (...,)."""
    one, other = one.double().cpu(), other.double().cpu()
    return torch.linalg.matrix_norm(other - one @ (one.mT @ other), ord=2).clamp(max=1.0).float()


def certified_rank(angles: Sequence[float], max_angle: float) -> int:
    """The number of leading directions that a sample determines; 0 where it determines none.

    Args:
        angles: entry k - 1 is the sine of the angle between two half-samples' first k directions
            (:func:`split_half_angles`).
        max_angle: largest sine that counts as determined.
    """
    return max((k for k, angle in enumerate(angles, start=1) if angle <= max_angle), default=0)


def gate_rank(angles: Sequence[float], max_angle: float, low: int = 2) -> int:
    """The number of directions to build a gate in: those that are certified, but at least ``low``.

    Where fewer are certified, the number of directions from ``low`` on that the halves agree on best.
    """
    low = min(low, len(angles))
    certified = certified_rank(angles, max_angle)
    return certified if certified >= low else min(range(low, len(angles) + 1), key=lambda k: angles[k - 1])


def gap_rank(singular_values: Tensor, low: int = 4, high: int = 16) -> int:
    """The number of directions r in [low, high] with the largest relative gap s_r / s_(r+1).

    Args:
        singular_values: (m,) descending; r needs m > r, so a smaller m limits the choice.
        low: smallest r.
        high: largest r.
    """
    values = singular_values.double().cpu()
    high = min(high, values.numel() - 1)
    if high <= low:
        return min(low, values.numel())
    floor = values[0].clamp(min=torch.finfo(torch.float64).tiny) * 1e-6
    ratio = values[low - 1 : high] / values[low : high + 1].clamp(min=float(floor))
    return low + int(ratio.argmax())


def _as_layers(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    layers = [x] if isinstance(x, Tensor) and x.dim() == 2 else list(x)
    if not layers or any(not isinstance(h, Tensor) or h.dim() != 2 or not h.is_floating_point() for h in layers):
        raise MocteError("sampled_svd takes floating point rows (n, d), (L, n, d) or a list of (n, d) matrices.")
    if len({h.shape[1] for h in layers}) > 1:
        raise MocteError(
            f"sampled_svd: layers of different widths {[h.shape[1] for h in layers]}; call it once for each width."
        )
    return layers


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    """What errors call the layers."""
    if names is not None and len(names) != count:
        raise MocteError(f"sampled_svd: {len(names)} names for {count} layers; give one name to each.")
    return [f"layer {i}" for i in range(count)] if names is None else list(names)


def _moments(layers: list[Tensor], axis: Axis, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (L, d) fp32, total centred sum of squares (L,) fp64, rows (L,), of all ranks' rows."""
    parts = []
    for h in layers:
        bad = (~torch.isfinite(h)).any(dim=1).sum()
        square = torch.linalg.vector_norm(h, dtype=torch.float64).square()
        facts = torch.stack([torch.full_like(square, h.shape[0]), bad.double(), square])
        parts.append(torch.cat([facts, h.sum(0, dtype=torch.float64)]))
    sums = sum_over_ranks(torch.stack(parts), axis)
    rows, bad, squares = (sums[:, i] for i in range(3))
    if bad.any():
        found: dict[str, tuple[int, int]] = {}
        for name, b, n in zip(names, bad.tolist(), rows.tolist(), strict=True):  # a layer's halves have one name
            before = found.get(name, (0, 0))
            found[name] = (before[0] + int(b), before[1] + int(n))
        places = "; ".join(f"{name}: {b} of {n}" for name, (b, n) in found.items() if b)
        raise MocteError(
            f"sampled_svd: rows with NaN or infinity ({places}). The features have overflowed: lower the "
            "learning rate, clip gradients, or resume from an earlier checkpoint."
        )
    if (rows == 0).any():
        raise MocteError("sampled_svd: no rank has any row; sample features in a forward pass before the check.")
    mean = sums[:, 3:] / rows[:, None]
    total = (squares - rows * mean.square().sum(1)).clamp(min=0)
    return mean.float(), total.cpu(), rows.round().long()


def _start(basis: Tensor | None, rank: int, count: int, width: int, seed: int, device: torch.device) -> Tensor:
    """(L, d, q) orthonormal first block: the given basis, filled up with random directions."""
    q = min(rank + OVERSAMPLING, width)
    noise = torch.randn(width, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise.expand(count, width, q)
    if basis is None:
        return orthonormal_against(None, noise).to(device, torch.float32)
    known = basis.shape[-1]
    expected = (width,) if basis.dim() == 2 and count == 1 else (count, width)
    if basis.dim() not in (2, 3) or tuple(basis.shape[:-1]) != expected:
        raise MocteError(
            f"sampled_svd: a basis of shape {tuple(basis.shape)} does not fit {count} layers of {width} features; pass "
            "the last result's basis, or None after the model has changed."
        )
    basis = basis.reshape(count, width, known)[..., :q].double().cpu()
    return orthonormal_against(None, torch.cat([basis, noise[..., known:]], dim=-1)).to(device, torch.float32)


def _krylov(layers: list[Tensor], mean: Tensor, start: Tensor, known: int, passes: int | None, axis: Axis) -> Tensor:
    """(L, d, <= q (P + 1)) orthonormal: the start, of which ``known`` columns are old, and what each pass adds."""
    blocks = newest = start
    planned = passes if passes is not None else WARM_PASSES if known else COLD_PASSES
    done = 0
    while done < planned and blocks.shape[1] > blocks.shape[2]:
        y = torch.stack([_power(h, mu, v) for h, mu, v in zip(layers, mean, newest, strict=True)])
        y = sum_over_ranks(y, axis).double()
        if known and passes is None and done == 0:
            moved = sine_of_largest_angle(start[..., :known], orthonormal_against(None, y[..., :known]))
            # One rank decides: another number of passes on another rank, by rounding, would leave it waiting.
            planned = from_rank_zero(MOVED_PASSES if float(moved.max()) > STALE else WARM_PASSES, axis)
        room = blocks.shape[1] - blocks.shape[2]
        newest = orthonormal_against(blocks.double(), y)[..., :room].float()
        blocks = torch.cat([blocks, newest], dim=-1)
        done += 1
    return blocks


def _power(h: Tensor, mu: Tensor, v: Tensor) -> Tensor:
    """(d, q) X^T (X V) for X = H - 1 mu^T of this rank's rows."""
    h = h.float()
    z = h @ v - mu @ v
    return h.mT @ z - torch.outer(mu, z.sum(0))


def _project(h: Tensor, mu: Tensor, q: Tensor) -> Tensor:
    """(m, m) fp64 (X Q)^T (X Q) of this rank's rows."""
    z = (h.float() @ q - mu @ q).double()
    return z.mT @ z


def _ritz(projected: Tensor, blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values (L, r) fp64 on the CPU, and directions (L, d, r) fp32."""
    # On the CPU in fp64: tiny matrices, and no solver that may fail to converge.
    energy, turn = torch.linalg.eigh(projected.cpu())
    energy, turn = energy.flip(-1)[:, :rank], turn.flip(-1)[..., :rank]
    directions = blocks @ turn.to(blocks)
    # A singular vector's sign is free: its largest entry shall be positive, whatever the number of ranks.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return energy.clamp(min=0).sqrt(), directions * torch.where(largest < 0, -1.0, 1.0)


def _turn(directions: Tensor, basis: Tensor) -> Tensor:
    """``directions`` turned within their span to lie as near as possible to ``basis`` (orthogonal Procrustes)."""
    if basis.shape[-1] != directions.shape[-1]:
        return directions
    overlap = directions.mT.double().cpu() @ basis.double().cpu()
    left, _, right = torch.linalg.svd(overlap)
    return directions @ (left @ right).to(directions)
