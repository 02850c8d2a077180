"""The largest eigenvalue of an expert's neural-tangent kernel: how much a step can still change its outputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocte_ds.trainability.forms import checked_rows, evaluating, first, known_ffn

# Shapes: n rows, d features, f hidden units. Theta = J J^T over the n * d outputs, J by the module's own parameters.

Product = Callable[[Tensor], Tensor]
"""v (n, d) to Theta v (n, d)."""


class Eigenpair(NamedTuple):
    """What :func:`top_eigenpair` found."""

    value: float
    vector: Tensor
    """(n, d') of length one."""
    products: int
    """With Theta."""


_STEPS_A_ROUND = 40  # Lanczos vectors that are kept at once
_LOOK_EVERY = 4  # products


def lambda_max(expert: nn.Module, x: Tensor) -> float:
    """Largest eigenvalue of Theta = J J^T, J the Jacobian of all outputs by the module's parameters.

    Closed form for gated and two-matrix FFNs (SwiGLU, GELU, their narrow `lora` form; of this project and of
    transformers), torch.func products for any other module. fp32, or fp64 if x is fp64.

    Args:
        expert: maps (n, d) to (n, d'), or to a tuple whose first entry is that; its parameters count whether or not
            they require gradients.
        x: (n, d) rows that it is evaluated on.

    Returns:
        sigma_max(J)^2, to a relative 1e-6.

    Raises:
        MocteError: no rows, rows that are not a matrix or not finite, or a module without parameters.
    """
    return top_eigenpair(expert, x, iterations=400, tolerance=1e-7).value


@torch.no_grad()
def top_eigenpair(
    expert: nn.Module,
    x: Tensor,
    iterations: int = 20,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    after: Callable[[int], None] | None = None,
) -> Eigenpair:
    """Largest eigenvalue of Theta and its eigenvector.

    The Lanczos method with full reorthogonalisation: as many products as power iteration, but the best vector of their
    whole span (Paige, 1980), so that 20 products resolve what power iteration needs hundreds for.

    Args:
        expert: as for :func:`lambda_max`.
        x: (n, d).
        iterations: largest number of products with Theta.
        start: (n, d') the last check's eigenvector; None: a fixed random one.
        tolerance: stops where the residual |Theta v - lambda v| is under this share of lambda; looked at after every
            fourth product.
        after: told 0 before the first product, and the number of products after each.

    Raises:
        MocteError: as for :func:`lambda_max`.
    """
    x = checked_rows(expert, x)
    with torch.autocast(x.device.type, enabled=False):
        product, shape = _closed_form(expert, x) or _by_autograd(expert, x)
        if start is None or start.shape != shape:
            start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        after = after or (lambda products: None)
        after(0)
        return _lanczos(product, start.to(x), iterations, tolerance, after)


def products_flops(product: int, outputs: int, products: int) -> int:
    """FLOPs of so many products in :func:`top_eigenpair` and of what is done with them, as torch counts both.

    Args:
        product: FLOPs of one product with Theta.
        outputs: n d'.
        products: how many. Every fourth time and at the end of a basis of k vectors their projections on the images
            take 2 n d' k^2 and the residual 4 n d' k; the best vector at the end of a basis takes 2 n d' k.
    """
    total = 0
    for done in range(1, products + 1):
        k = (done - 1) % _STEPS_A_ROUND + 1
        total += product
        if _looks_at(k - 1, _STEPS_A_ROUND) or done == products:
            total += 2 * outputs * k * (k + 2)
        if k == _STEPS_A_ROUND or done == products:
            total += 2 * outputs * k
    return total


def _lanczos(
    product: Product, start: Tensor, iterations: int, tolerance: float, after: Callable[[int], None]
) -> Eigenpair:
    vector, value, done = start.reshape(-1) / start.norm().clamp(min=1e-30), 0.0, 0
    floor = 100 * torch.finfo(start.dtype).eps
    while done < iterations:
        steps = min(_STEPS_A_ROUND, iterations - done)
        basis, image = vector.new_empty(steps, len(vector)), vector.new_empty(steps, len(vector))
        basis[0] = vector
        for k in range(steps):
            done += 1
            image[k] = product(basis[k].view(start.shape)).reshape(-1)
            after(done)
            q, y = basis[: k + 1], image[: k + 1]
            rest = image[k] - q.T @ (q @ image[k])
            sizes = torch.stack([rest.norm(), image[k].norm()]).tolist()
            # The span is invariant: what is left is rounding, and nothing larger can be seen from here.
            whole = sizes[0] <= floor * sizes[1]
            if whole or _looks_at(k, steps):
                # Rayleigh-Ritz with the explicit products: no error piles up in a three-term recurrence.
                projected = (q @ y.T).double().cpu()
                values, turns = torch.linalg.eigh((projected + projected.mT) / 2)
                value, turn = float(values[-1]), turns[:, -1].to(vector)
                residual = float((turn @ y - value * (turn @ q)).norm())
                if whole or value <= 0.0 or residual <= tolerance * value:
                    return Eigenpair(max(value, 0.0), (turn @ q).view(start.shape), done)
            if k + 1 < steps:
                # Rounding is large relative to a small remainder: orthogonalise it again at length one.
                rest = rest / sizes[0]
                rest = rest - q.T @ (q @ rest)
                basis[k + 1] = rest / rest.norm()
        vector = turn @ q
    return Eigenpair(value, vector.view(start.shape), done)


def _looks_at(k: int, steps: int) -> bool:
    """Whether the largest eigenvalue is computed after product ``k`` of a round; a small product takes less time."""
    return (k + 1) % _LOOK_EVERY == 0 or k + 1 == steps


def _closed_form(expert: nn.Module, x: Tensor) -> tuple[Product, tuple[int, int]] | None:
    """Theta v without a Jacobian, or None for a module that is not of a known form (docs/method.md, section 5).

    Two matrices, y = B phi(A x), H = X A^T, D = phi'(H):
        Theta v = phi(H) (phi(H)^T v) + [ (X X^T ((v B) * D)) * D ] B^T
    Gated, y = B (phi(G x) * U x): h = phi(g) u, D_g = phi'(g) u, D_u = phi(g), t = v B:
        Theta v = h (h^T v) + [ (X X^T (t * D_g)) * D_g + (X X^T (t * D_u)) * D_u ] B^T
    A bias is a feature that is always one: X X^T + 1 1^T, and h h^T + 1 1^T for the output's.
    """
    ffn = known_ffn(expert, x)
    if ffn is None:
        return None

    def product(v: Tensor) -> Tensor:
        back = v @ ffn.output
        moved = torch.zeros_like(back)
        for gram, d in zip(ffn.input_grams, ffn.slopes, strict=True):
            moved += (gram @ (back * d)) * d
        return ffn.hidden_gram @ v + moved @ ffn.output.T

    return product, ffn.shape


def _by_autograd(expert: nn.Module, x: Tensor) -> tuple[Product, tuple[int, ...]]:
    """Theta v = J (J^T v) of any module, by one backward and one forward derivative per product."""
    parameters = {name: p.detach().to(x) for name, p in expert.named_parameters()}
    buffers = {name: b.to(x) if b.is_floating_point() else b for name, b in expert.named_buffers()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return first(torch.func.functional_call(expert, {**buffers, **values}, (x,)))

    with evaluating(expert), torch.enable_grad():
        y, backward = torch.func.vjp(outputs, parameters)

    def product(v: Tensor) -> Tensor:
        (direction,) = backward(v)
        with evaluating(expert):
            return torch.func.jvp(outputs, (parameters,), (direction,))[1].detach()

    return product, tuple(y.shape)
