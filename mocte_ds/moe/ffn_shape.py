"""Where the matrices of an FFN are and how they are laid out, found by their shapes and not by their names."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocte_ds.remote_code.experts_mocte import in_out, is_matrix

FORMS = "two matrices d -> f -> d; three, of which two go d -> f; or two, d -> 2 f and f -> d"
"""What is recognised, for messages."""

# Shapes: d features, f hidden units.


@dataclass(frozen=True)
class FFNShape:
    """Where the matrices of an FFN are and how large they are."""

    inputs: tuple[str, ...]
    """Paths of the matrices that read the feature, as registered: two for a gated FFN, unless it is fused."""
    output: str
    """Path of the matrix that writes the output."""
    hidden_size: int
    """Width d of the feature."""
    width: int
    """Hidden units f."""
    fused: bool = False
    """One input matrix holds both halves of a gated FFN, 2 f outputs: gate_up_proj of Phi-3 and GLM-4."""


def ffn_shape(ffn: nn.Module, any_output: bool = False) -> FFNShape | None:
    """Shape of an FFN of one of the FORMS, else None.

    Args:
        ffn: any module; its matrices may be nn.Linear or transformers' Conv1D (whose weight is stored transposed), at
            any depth. No other parameters may be in it. Where d = f, the matrix that was registered last is taken for
            the output; :func:`is_additive` tells whether that is right.
        any_output: allow outputs of another width than the feature.
    """
    if is_matrix(ffn):
        return None  # a layer by itself
    matrices = {name: in_out(module) for name, module in ffn.named_modules() if is_matrix(module)}
    known = {id(p) for name in matrices for p in ffn.get_submodule(name).parameters()}
    if len(matrices) not in (2, 3) or any(id(p) not in known for p in ffn.parameters()):
        return None
    shapes = [s for s in _fitting(matrices) if any_output or matrices[s.output][1] == s.hidden_size]
    # Two matrices d -> f -> d are f -> d -> f as well: one of the two cannot be called.
    return next((s for s in shapes if len(shapes) == 1 or _takes(ffn, s.hidden_size)), None)


def _fitting(matrices: dict[str, tuple[int, int]]) -> Iterator[FFNShape]:
    """Shapes that a set of matrices (inputs, outputs) can have, the most likely one first."""
    for output in reversed(matrices):
        width = matrices[output][0]
        inputs = tuple(name for name in matrices if name != output)
        hidden_size = matrices[inputs[0]][0]
        if all(matrices[name] == (hidden_size, width) for name in inputs):
            yield FFNShape(inputs, output, hidden_size, width)
        elif len(inputs) == 1 and matrices[inputs[0]][1] == 2 * width:
            yield FFNShape(inputs, output, hidden_size, width, fused=True)


def _takes(ffn: nn.Module, hidden_size: int) -> bool:
    """Whether a module can be called with features of a width; nothing is computed."""
    tensors = [*ffn.named_parameters(), *ffn.named_buffers()]
    nowhere = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    dtype = next(ffn.parameters()).dtype
    try:
        torch.func.functional_call(ffn, nowhere, (torch.empty(1, hidden_size, dtype=dtype, device="meta"),))
    except Exception:  # whatever a user's module raises
        return False
    return True


def is_additive(ffn: nn.Module, shape: FFNShape) -> bool:
    """Whether each hidden unit adds its own part to the output, so that an FFN may be cut into slices and narrowed.

    A shape says nothing of the function: a residual or a norm inside, or gates and values that lie in another order,
    would give slices that do not add up, without an error. So the FFN is called on a few rows: without its matrices it
    must give zero, and its two halves must add up to it. Weights without values (on the meta device) pass.
    """
    if _is_elsewhere(ffn):
        return True
    whole, nothing = _units(shape, 0, shape.width), _units(shape, 0, 0)
    half = (shape.width + 1) // 2
    parts = (
        (whole, True),
        (nothing, False),
        (_units(shape, 0, half), True),
        (_units(shape, half, shape.width), False),
    )
    outputs = [_with_units(ffn, shape, units, bias) for units, bias in parts]
    known = [output for output in outputs if output is not None]
    if len(known) < len(outputs):
        return False
    return not bool(known[1].any()) and _close(known[2] + known[3], known[0])


def gives_slice(ffn: nn.Module, shape: FFNShape, expert: nn.Module, part: "FFNSlice") -> bool:
    """Whether an expert computes what its slice of the FFN's hidden units computes; for an FFN that is additive."""
    if _is_elsewhere(ffn):
        return True
    width = shape.width // part.count
    expected = _with_units(ffn, shape, _units(shape, part.number * width, (part.number + 1) * width), part.number == 0)
    found = _output(expert, dict(expert.named_parameters()), shape)
    return expected is not None and found is not None and _close(found, expected)


def _is_elsewhere(ffn: nn.Module) -> bool:
    return any(p.device.type == "meta" or not p.numel() for p in ffn.parameters())


def _units(shape: FFNShape, start: int, end: int) -> Tensor:
    units = torch.arange(shape.width)
    return (units >= start) & (units < end)


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _with_units(ffn: nn.Module, shape: FFNShape, units: Tensor, bias: bool) -> Tensor | None:
    """Outputs on a few rows with all hidden units but ``units`` set to zero; the output's bias too unless ``bias``."""
    values = dict(ffn.named_parameters())
    for path in (*shape.inputs, shape.output):
        keep = units.repeat(2) if shape.fused and path != shape.output else units
        weight, old = values[f"{path}.weight"], values.get(f"{path}.bias")
        along_rows = isinstance(ffn.get_submodule(path), nn.Linear) != (path == shape.output)
        keep = keep.to(weight)
        values[f"{path}.weight"] = weight * (keep[:, None] if along_rows else keep)
        if old is not None:
            values[f"{path}.bias"] = old * bias if path == shape.output else old * keep
    return _output(ffn, values, shape)


@torch.no_grad()
def _output(module: nn.Module, values: dict[str, Tensor], shape: FFNShape) -> Tensor | None:
    """Outputs on a few rows in evaluation mode; None if the module cannot be called like this."""
    like = next(iter(values.values()))
    rows = torch.randn(4, shape.hidden_size, generator=torch.Generator().manual_seed(0)).to(like)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        outputs = torch.func.functional_call(module, values, (rows,))
    except Exception:  # whatever a user's module raises
        return None
    finally:
        for part, mode in modes:
            part.training = mode
    return outputs[0] if isinstance(outputs, tuple) else outputs


def first_matrix(module: nn.Module) -> nn.Module | None:
    """The first linear layer in a module."""
    return next((part for part in module.modules() if is_matrix(part)), None)


@dataclass(frozen=True)
class FFNSlice:
    """Which slice of an FFN's hidden units a bank's experts take over."""

    number: int = 0
    """From 0."""
    count: int = 1
    """Slices, equally wide."""

    def cut(self, ffn: nn.Module, name: str, value: Tensor) -> Tensor:
        """The slice of a tensor of the FFN: a parameter, or what the optimizer keeps of it.

        The slices' outputs add up to the FFN's: the output's bias goes to the first.

        Args:
            ffn: the dense FFN.
            name: of its parameter, e.g. `up_proj.weight`.
            value: of that parameter's shape.
        """
        if self.count == 1:
            return value
        shape, (path, _, kind) = ffn_shape(ffn), name.rpartition(".")
        assert shape is not None  # banks are refused for any other module
        width = shape.width // self.count
        units = torch.arange(self.number * width, (self.number + 1) * width, device=value.device)
        rows_are_outputs = isinstance(ffn.get_submodule(path), nn.Linear)  # Conv1D is stored transposed
        if path == shape.output:
            if kind == "bias":
                return value if self.number == 0 else torch.zeros_like(value)
            return value[:, units] if rows_are_outputs else value[units]
        if shape.fused:
            units = torch.cat([units, units + shape.width])
        return value[units] if kind == "bias" or rows_are_outputs else value[:, units]
