"""Linear layers of an expert, in training and in an exported model; needs torch alone."""

import copy
from collections.abc import Mapping

from torch import nn

# Shapes: d features, f hidden units.


def is_matrix(module: object) -> bool:
    """Whether a module is a linear layer: nn.Linear, or transformers' Conv1D, whose weight is stored transposed."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2
    )


def in_out(matrix: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    rows, columns = matrix.weight.shape
    return (columns, rows) if isinstance(matrix, nn.Linear) else (rows, columns)


def resized(matrix: nn.Module, inputs: int | None = None, outputs: int | None = None) -> nn.Module:
    """A new matrix of the same class with another number of inputs or outputs, still to be filled."""
    old_inputs, old_outputs = in_out(matrix)
    n_in, n_out = inputs or old_inputs, outputs or old_outputs
    like = {"device": matrix.weight.device, "dtype": matrix.weight.dtype}
    if isinstance(matrix, nn.Linear):
        return nn.Linear(n_in, n_out, bias=matrix.bias is not None, **like)
    return type(matrix)(n_out, n_in).to(**like)


def sizes_of(expert: nn.Module, ffn: nn.Module) -> dict[str, list[int]]:
    """Inputs and outputs of each linear layer of an expert that has others than the dense FFN's, by its path."""
    wide = {name: in_out(module) for name, module in ffn.named_modules() if is_matrix(module)}
    found = {name: in_out(module) for name, module in expert.named_modules() if is_matrix(module)}
    return {name: list(size) for name, size in found.items() if size != wide.get(name)}


def expert_like(ffn: nn.Module, sizes: Mapping[str, list[int]]) -> nn.Module:
    """A copy of the dense FFN in which some linear layers have other sizes, still to be filled.

    Args:
        ffn: the FFN.
        sizes: from :func:`sizes_of`.
    """
    expert = copy.deepcopy(ffn)
    for path, (inputs, outputs) in sizes.items():
        expert.set_submodule(path, resized(ffn.get_submodule(path), inputs, outputs))
    return expert
