"""The largest eigenvalue of an expert's neural-tangent kernel: how much a step can still change its outputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.errors import MocteError
from mocte_ds.moe.experts import FFNShape, ffn_shape

# Shapes: n rows, d features, f hidden units. Theta = J J^T over the n * d outputs, J by the module's own parameters.

Product = Callable[[Tensor], Tensor]
"""v (n, d) to Theta v (n, d)."""

_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
# Largest difference, over the largest output, at which a module counts as the known form: the rounding of bf16.
_SAME = 0.03
_STEPS_A_ROUND = 40  # Lanczos vectors that are kept at once


def lambda_max(expert: nn.Module, x: Tensor) -> float:
    """Largest eigenvalue of Theta = J J^T, J the Jacobian of all outputs by the module's parameters.

    Closed form for gated and two-matrix FFNs (SwiGLU, GELU, their narrow `lora` form; of this project and of
    transformers), torch.func products for any other module. fp32, or fp64 where x is fp64.

    Args:
        expert: maps (n, d) to (n, d'), or to a tuple whose first entry is that; its parameters count whether or not
            they require gradients.
        x: (n, d) rows that it is evaluated on.

    Returns:
        sigma_max(J)^2, to a relative 1e-6.

    Raises:
        MocteError: no rows, rows that are not a matrix or not finite, or a module without parameters.
    """
    return top_eigenpair(expert, x, iterations=400, tolerance=1e-7)[0]


@torch.no_grad()
def top_eigenpair(
    expert: nn.Module, x: Tensor, iterations: int = 20, start: Tensor | None = None, tolerance: float = 1e-4
) -> tuple[float, Tensor]:
    """Largest eigenvalue of Theta and its eigenvector.

    The Lanczos method with full reorthogonalisation: as many products as power iteration, but the best vector of their
    whole span (Paige, 1980), so that 20 products resolve what power iteration needs hundreds for.

    Args:
        expert: as for :func:`lambda_max`.
        x: (n, d).
        iterations: products with Theta at most.
        start: (n, d') the last check's eigenvector; None: a fixed random one.
        tolerance: stops where the residual |Theta v - lambda v| is under this share of lambda.

    Returns:
        The value, and the vector (n, d') of length one.

    Raises:
        MocteError: as for :func:`lambda_max`.
    """
    if x.dim() != 2 or not x.shape[0] or not x.is_floating_point():
        raise MocteError(f"trainability is measured on rows (n, d), n of 1 or more, not on {tuple(x.shape)} {x.dtype}.")
    if not bool(torch.isfinite(x).all()):
        raise MocteError("trainability cannot be measured: some rows are NaN or infinite.")
    parameters = dict(expert.named_parameters())
    if not parameters:
        raise MocteError(f"trainability is of parameters, and {type(expert).__name__} has none.")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    with torch.autocast(x.device.type, enabled=False):
        product, shape = _closed_form(expert, x) or _by_autograd(expert, x)
        if start is None or start.shape != shape:
            start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return _lanczos(product, start.to(x), iterations, tolerance)


def _lanczos(product: Product, start: Tensor, iterations: int, tolerance: float) -> tuple[float, Tensor]:
    vector, value, done = start / start.norm().clamp(min=1e-30), 0.0, 0
    floor = 100 * torch.finfo(start.dtype).eps
    while done < iterations:
        basis, image = [vector.reshape(-1)], []
        for _ in range(min(_STEPS_A_ROUND, iterations - done)):
            done += 1
            image.append(product(basis[-1].view(vector.shape)).reshape(-1))
            q, y = torch.stack(basis), torch.stack(image)
            # Rayleigh-Ritz with the explicit products: no error piles up in a three-term recurrence.
            projected = (q @ y.T).double().cpu()
            values, turns = torch.linalg.eigh((projected + projected.mT) / 2)
            value, turn = float(values[-1]), turns[:, -1].to(vector)
            residual = float((turn @ y - value * (turn @ q)).norm())
            if value <= 0.0 or residual <= tolerance * value:
                return max(value, 0.0), (turn @ q).view(vector.shape)
            rest = image[-1] - q.T @ (q @ image[-1])
            if float(rest.norm()) <= floor * float(image[-1].norm()):
                # The span is invariant: what is left is rounding, and nothing larger can be seen from here.
                return value, (turn @ q).view(vector.shape)
            # What is left may be small, and then its own rounding is not: clean it at length one.
            rest = rest / rest.norm()
            rest = rest - q.T @ (q @ rest)
            basis.append(rest / rest.norm())
        vector = (turn @ q).view(vector.shape)
    return value, vector


@dataclass(frozen=True)
class _Matrices:
    """The matrices of an FFN in the layout of nn.Linear, in the precision of the rows."""

    inputs: list[Tensor]
    """(f, d) each; two for a gated FFN."""
    input_biases: list[Tensor | None]
    output: Tensor
    """(d', f)."""
    output_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]


def _closed_form(expert: nn.Module, x: Tensor) -> tuple[Product, tuple[int, int]] | None:
    """Theta v without a Jacobian, or None for a module that is not of a known form (docs/method.md, section 5).

    Two matrices, y = B phi(A x), H = X A^T, D = phi'(H):
        Theta v = phi(H) (phi(H)^T v) + [ (X X^T ((v B) * D)) * D ] B^T
    Gated, y = B (phi(G x) * U x): h = phi(g) u, D_g = phi'(g) u, D_u = phi(g), t = v B:
        Theta v = h (h^T v) + [ (X X^T (t * D_g)) * D_g + (X X^T (t * D_u)) * D_u ] B^T
    A bias is a feature that is always one: X X^T + 1 1^T, and h h^T + 1 1^T for the output's.
    """
    shape = ffn_shape(expert)
    m = None if shape is None else _matrices(expert, shape, x)
    if m is None:
        return None
    pre = [F.linear(x, weight, bias) for weight, bias in zip(m.inputs, m.input_biases, strict=True)]
    activated, slope = _with_slope(m.activation, pre[0])
    if len(pre) == 2:
        hidden, slopes = activated * pre[1], [slope * pre[1], activated]
    else:
        hidden, slopes = activated, [slope]
    # Dropout, other orders, other activations: only what computes the same thing has this kernel.
    expected = _call(expert, x)
    found = F.linear(hidden, m.output, m.output_bias)
    if expected.shape != found.shape or float((found - expected).abs().max()) > _SAME * float(expected.abs().max()):
        return None
    gram = x @ x.T
    grams = [gram if bias is None else gram + 1.0 for bias in m.input_biases]
    output_gram = hidden @ hidden.T + (0.0 if m.output_bias is None else 1.0)

    def product(v: Tensor) -> Tensor:
        back = v @ m.output
        moved = torch.zeros_like(back)
        for own, d in zip(grams, slopes, strict=True):
            moved += (own @ (back * d)) * d
        return output_gram @ v + moved @ m.output.T

    return product, tuple(found.shape)


def _matrices(expert: nn.Module, shape: FFNShape, x: Tensor) -> _Matrices | None:
    layers = [getattr(expert, name) for name in (*shape.inputs, shape.output)]
    known = {id(p) for layer in layers for p in layer.parameters()}
    if {id(p) for p in expert.parameters()} != known:
        return None
    activation = next((getattr(expert, name) for name in _ACTIVATIONS if hasattr(expert, name)), None)
    if not callable(activation):
        return None
    weights = [(layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).detach().to(x) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.detach().to(x) for layer in layers]
    return _Matrices(weights[:-1], biases[:-1], weights[-1], biases[-1], activation)


def _with_slope(activation: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    """phi(h) and phi'(h) of an activation that acts on each element."""
    with torch.enable_grad():
        h = h.detach().requires_grad_(True)
        value = activation(h)
        (slope,) = torch.autograd.grad(value.sum(), h)
    return value.detach(), slope


def _by_autograd(expert: nn.Module, x: Tensor) -> tuple[Product, tuple[int, ...]]:
    """Theta v = J (J^T v) of any module, by one backward and one forward derivative a product."""
    parameters = {name: p.detach().to(x) for name, p in expert.named_parameters()}
    buffers = {name: b.to(x) if b.is_floating_point() else b for name, b in expert.named_buffers()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(expert, {**buffers, **values}, (x,))
        return found[0] if isinstance(found, tuple) else found

    training = expert.training
    expert.eval()
    try:
        with torch.enable_grad():
            y, backward = torch.func.vjp(outputs, parameters)
    finally:
        expert.train(training)

    def product(v: Tensor) -> Tensor:
        (direction,) = backward(v)
        was_training = expert.training
        expert.eval()
        try:
            return torch.func.jvp(outputs, (parameters,), (direction,))[1].detach()
        finally:
            expert.train(was_training)

    return product, tuple(y.shape)


def _call(expert: nn.Module, x: Tensor) -> Tensor:
    """The module's own outputs in evaluation mode, in its own precision."""
    training, dtype = expert.training, next(expert.parameters()).dtype
    expert.eval()
    try:
        found = expert(x.to(dtype))
    finally:
        expert.train(training)
    return found[0] if isinstance(found, tuple) else found
