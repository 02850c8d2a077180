"""The Gram matrix of single tokens' gradients of an expert: do its tokens pull its weights in the same direction?"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocte_ds.errors import MocteError
from mocte_ds.trainability.forms import KnownFFN, call, checked_rows, evaluating, first, known_ffn

# Shapes: n rows, d features, d' outputs, P parameters.

# Gradients of single rows that are held at once where there is no closed form; twice that while blocks are compared.
_GRADIENT_FLOATS = 2**27


@torch.no_grad()
def ghost_gram(expert: nn.Module, x: Tensor, output_gradient: Tensor) -> Tensor:
    """K_ij = <g_i, g_j>, g_i the gradient of row i's loss by all parameters of the expert.

    For the gated and two-matrix FFNs that :func:`lambda_max` knows no g_i is formed: a linear layer that reads a_i and
    whose output has the gradient e_i contributes <a_i, a_j> <e_i, e_j> (Goodfellow, 2015, arXiv 1510.01799, for the
    norms), exactly. With D_y the output gradients, B the output matrix and h' the slopes of the hidden units,

        K = (h h^T) * (D_y D_y^T) + sum over input matrices of (X X^T) * (D_h D_h^T),   D_h = (D_y B) * h'

    and a bias adds 1 to its layer's X X^T or h h^T. Any other module: torch.func gradients row by row, in blocks of at
    most _GRADIENT_FLOATS numbers. fp32, or fp64 if x is fp64.

    Only inputs and output gradients are needed, so a frozen expert can be watched too.

    Args:
        expert: maps (n, d) to (n, d'), or to a tuple whose first entry is that, each row by itself; evaluated without
            dropout; its parameters count whether or not they require gradients.
        x: (n, d) rows that it read.
        output_gradient: (n, d') derivative of the loss by the expert's output on each row. A common factor (the mean
            over a batch, a loss scale) squares into K, and out of :func:`coherence` and :func:`conflict`.

    Returns:
        (n, n) symmetric, positive semidefinite to rounding, on the device of x.

    Raises:
        MocteError: no rows; rows or gradients that are not a matrix, not finite, or do not fit the expert; a module
            without parameters; a K that overflows.
    """
    x = checked_rows(expert, x)
    if not output_gradient.is_floating_point() or not bool(torch.isfinite(output_gradient).all()):
        raise MocteError("gradients of single rows cannot be compared: output_gradient is not of finite numbers.")
    gradient = output_gradient.detach().to(x)
    with torch.autocast(x.device.type, enabled=False):
        ffn = known_ffn(expert, x)
        expected = _output_shape(expert, x) if ffn is None else ffn.shape
        if tuple(gradient.shape) != expected:
            raise MocteError(
                f"output_gradient has the shape {tuple(gradient.shape)}, but {type(expert).__name__} gives {expected} "
                f"for rows {tuple(x.shape)}: one gradient of the expert's own output is needed for each row."
            )
        gram = _by_rows(expert, x, gradient) if ffn is None else _closed_form(ffn, gradient)
    if not bool(torch.isfinite(gram).all()):
        raise MocteError(
            f"gradients of {type(expert).__name__} cannot be compared: the products are NaN or infinite. Its weights "
            "may be; else divide output_gradient by its largest value."
        )
    return (gram + gram.T) / 2


def _closed_form(ffn: KnownFFN, gradient: Tensor) -> Tensor:
    gram = ffn.hidden_gram * (gradient @ gradient.T)
    back = gradient @ ffn.output
    for input_gram, slope in zip(ffn.input_grams, ffn.slopes, strict=True):
        hidden_gradient = back * slope
        gram += input_gram * (hidden_gradient @ hidden_gradient.T)
    return gram


def _output_shape(expert: nn.Module, x: Tensor) -> tuple[int, ...]:
    try:
        return tuple(call(expert, x).shape)
    except RuntimeError as error:
        raise MocteError(f"{type(expert).__name__} does not take rows {tuple(x.shape)}: {error}") from error


def _by_rows(expert: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """The Gram matrix from gradients of single rows, of any module."""
    n, size = x.shape[0], sum(p.numel() for p in expert.parameters())
    blocks = torch.arange(n, device=x.device).split(max(1, _GRADIENT_FLOATS // size))
    gram = x.new_empty(n, n)
    with evaluating(expert):
        gradients = _row_gradients(expert, x, gradient)
        for i, rows in enumerate(blocks):
            own = gradients(rows)
            # Blocks before this one are computed anew: time instead of n P numbers of memory.
            for j, columns in enumerate(blocks[: i + 1]):
                others = own if i == j else gradients(columns)
                part = sum(a.flatten(1) @ b.flatten(1).T for a, b in zip(own, others, strict=True))
                gram[rows[:, None], columns], gram[columns[:, None], rows] = part, part.T
    return gram


def _row_gradients(expert: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """Row numbers (m,) to the gradients of their rows' losses, (m, ...) for each parameter."""
    parameters = {name: p.detach().to(x) for name, p in expert.named_parameters()}
    buffers = {
        # Copies: the module's own must not change.
        name: b.detach().to(x, copy=True) if b.is_floating_point() else b.detach().clone()
        for name, b in expert.named_buffers()
    }

    def loss(values: dict[str, Tensor], row: Tensor, slope: Tensor) -> Tensor:
        y = first(torch.func.functional_call(expert, {**buffers, **values}, (row[None],)))
        return (y[0] * slope).sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def one_by_one(rows: Tensor) -> list[Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        found = []
        for row, slope in zip(x[rows], gradient[rows], strict=True):
            with torch.enable_grad():
                value = loss(leaves, row, slope)
            if not value.requires_grad:
                found.append([torch.zeros_like(leaf) for leaf in leaves.values()])
                continue
            found.append(torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True))
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def gradients(rows: Tensor) -> list[Tensor]:
        try:
            return list(together(parameters, x[rows], gradient[rows]).values())
        except RuntimeError:
            # Not everything can be batched or transformed: choices by value, in-place writes, autograd functions.
            return one_by_one(rows)

    return gradients
