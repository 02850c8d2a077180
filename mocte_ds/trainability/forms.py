"""An FFN of a known form taken apart on given rows, and how to call an expert without leaving a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.errors import MocteError
from mocte_ds.moe.ffn_shape import FFNShape, ffn_shape

# Shapes: n rows, d features, d' outputs, f hidden units.

# Attributes that hold the activation where it is a function and no module.
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
# Largest difference, over the largest output, at which a module counts as the known form: the rounding of bf16.
_SAME = 0.03


@dataclass(frozen=True)
class KnownFFN:
    """y = B h + c with h = phi(A x + a), or phi(G x + g) * (U x + u) for a gated FFN, in the precision of the rows."""

    output: Tensor
    """(d', f) the matrix B."""
    slopes: list[Tensor]
    """(n, f) for each input matrix: the derivative of h by the matrix's output; two for a gated FFN."""
    input_grams: list[Tensor]
    """(n, n) for each input matrix: X X^T, plus 1 everywhere if it has a bias."""
    hidden_gram: Tensor
    """(n, n) h h^T, plus 1 everywhere if the output has a bias."""
    shape: tuple[int, int]
    """(n, d') of the outputs."""


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


def checked_rows(expert: nn.Module, x: Tensor) -> Tensor:
    """The rows (n, d) without their graph, in fp32, or in fp64 if they are.

    Raises:
        MocteError: no rows, rows that are not a matrix or not finite, or a module without parameters.
    """
    if x.dim() != 2 or not x.shape[0] or not x.is_floating_point():
        raise MocteError(f"trainability is measured on rows (n, d), n of 1 or more, not on {tuple(x.shape)} {x.dtype}.")
    if not bool(torch.isfinite(x).all()):
        raise MocteError("trainability cannot be measured: some rows are NaN or infinite.")
    if next(expert.parameters(), None) is None:
        raise MocteError(f"trainability is of parameters, and {type(expert).__name__} has none.")
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def known_ffn(expert: nn.Module, x: Tensor) -> KnownFFN | None:
    """What closed forms need of a gated or two-matrix FFN on rows x (n, d), or None for any other module.

    The expert is called once, or twice if it is gated: dropout and other orders are not of a known form.
    """
    shape = ffn_shape(expert, any_output=True)
    if shape is None or shape.hidden_size != x.shape[1]:
        return None
    m = _matrices(expert, shape, x)
    if m is None:
        return None
    # Shapes do not tell which half of a gated FFN the activation is for: its outputs do.
    found = next((form for n in range(len(m.inputs)) if (form := _form(expert, shape, x, m, n))), None)
    if found is None:
        return None
    hidden, slopes = found
    gram = x @ x.T
    return KnownFFN(
        output=m.output,
        slopes=slopes,
        # A bias is a feature that is always one.
        input_grams=[gram if bias is None else gram + 1.0 for bias in m.input_biases],
        hidden_gram=hidden @ hidden.T + (0.0 if m.output_bias is None else 1.0),
        shape=(x.shape[0], m.output.shape[0]),
    )


def _form(
    expert: nn.Module, shape: FFNShape, x: Tensor, m: _Matrices, activated: int
) -> tuple[Tensor, list[Tensor]] | None:
    """h and its slope by each input matrix, if the activation acts on matrix ``activated``; None if it does not."""
    pre = [F.linear(x, weight, bias) for weight, bias in zip(m.inputs, m.input_biases, strict=True)]
    hidden, slope = _with_slope(m.activation, pre[activated])
    slopes = [slope]
    if len(pre) == 2:
        other = pre[1 - activated]
        slopes.insert(1 - activated, hidden)
        slopes[activated] = slope * other
        hidden = hidden * other
    return (hidden, slopes) if _computes(expert, shape, x, hidden, m) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode; after it every submodule is in the mode that it was in before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(modes[0][1])
        for part, mode in modes:
            part.training = mode


def first(outputs: Tensor | tuple) -> Tensor:
    """The tensor among a module's outputs: itself, or a tuple's first entry."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def call(expert: nn.Module, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
    """The module's outputs on x in evaluation mode, in its own precision; ``values`` stand in for its parameters.

    It works on copies of the module's buffers, so that the call leaves no trace.
    """
    stand_ins = {name: buffer.clone() for name, buffer in expert.named_buffers()} | (values or {})
    with evaluating(expert), torch.no_grad():
        rows = x.to(next(expert.parameters()).dtype)
        return first(torch.func.functional_call(expert, stand_ins, (rows,)))


def _computes(expert: nn.Module, shape: FFNShape, x: Tensor, hidden: Tensor, m: _Matrices) -> bool:
    """Whether the module's outputs are B h + c. A B of zeros would hide all of h, so a random one stands in for it."""
    output, values = m.output, None
    if not bool(output.any()):
        layer = expert.get_submodule(shape.output)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
        values = {f"{shape.output}.weight": weight}
        output = (weight if isinstance(layer, nn.Linear) else weight.T).to(x)
    expected, found = call(expert, x, values), F.linear(hidden, output, m.output_bias)
    if expected.shape != found.shape:
        return False
    return not float((found - expected).abs().max()) > _SAME * float(expected.abs().max())


def _matrices(expert: nn.Module, shape: FFNShape, x: Tensor) -> _Matrices | None:
    layers = [expert.get_submodule(path) for path in (*shape.inputs, shape.output)]
    known = [id(p) for layer in layers for p in layer.parameters()]
    # Other parameters have gradients too, and those of tied matrices add up.
    if sorted(known) != sorted(id(p) for p in expert.parameters()):
        return None
    activation = _activation(expert)
    if activation is None:
        return None
    weights = [(layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).detach().to(x) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.detach().to(x) for layer in layers]
    inputs, input_biases = weights[:-1], biases[:-1]
    if shape.fused:
        inputs = list(inputs[0].chunk(2))
        input_biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
    return _Matrices(inputs, input_biases, weights[-1], biases[-1], activation)


def _activation(expert: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The activation of an FFN: its only module without parameters, or what an attribute names."""
    parts = [
        part
        for part in expert.modules()
        if part is not expert and not isinstance(part, nn.Dropout) and not next(part.children(), None)
        if next(part.parameters(), None) is None
    ]
    named = next((getattr(expert, name) for name in _ACTIVATIONS if hasattr(expert, name)), None)
    return parts[0] if len(parts) == 1 else named if callable(named) else None


def _with_slope(activation: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    """phi(h) and phi'(h) of an activation that acts on each element."""
    with torch.enable_grad():
        h = h.detach().requires_grad_(True)
        # A copy: it may act in place.
        value = activation(h.clone())
        (slope,) = torch.autograd.grad(value.sum(), h)
    return value.detach(), slope
