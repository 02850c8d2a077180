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
            any depth. No other weight with two dimensions or more may be in it. Where d = f, the matrix that was
            registered last is the output.
        any_output: allow outputs of another width than the feature.
    """
    if is_matrix(ffn):
        return None  # a layer by itself
    matrices = {name: in_out(module) for name, module in ffn.named_modules() if is_matrix(module)}
    known = {id(p) for name in matrices for p in ffn.get_submodule(name).parameters()}
    if len(matrices) not in (2, 3) or any(p.dim() > 1 and id(p) not in known for p in ffn.parameters()):
        return None
    return next((s for s in _fitting(matrices) if any_output or matrices[s.output][1] == s.hidden_size), None)


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


def first_matrix(module: nn.Module) -> nn.Module | None:
    """The first linear layer in a module."""
    return next((part for part in module.modules() if is_matrix(part)), None)


@dataclass(frozen=True)
class Part:
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
