"""Linear layers of an expert, in training and in an exported model; needs torch alone."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

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


class GatheredFFN(nn.Sequential):
    """An FFN whose parts were modules of a layer, which called them one after another; they keep their names."""


def ffn_of(layer: nn.Module, parts: Sequence[str]) -> GatheredFFN:
    """An FFN of modules of a layer; the layer stays as it is.

    Args:
        layer: that has them.
        parts: their names, in the order in which they are called.

    Raises:
        AttributeError: the layer has no such module.
    """
    ffn = GatheredFFN(OrderedDict((name, layer.get_submodule(name)) for name in parts))
    ffn.training = layer.training
    return ffn


def gather(layer: nn.Module, parts: Sequence[str]) -> GatheredFFN:
    """Put :func:`ffn_of` where the first part was, and nothing (nn.Identity) where the others were.

    The layer's own forward, which calls all of them, then computes the same.
    """
    ffn = ffn_of(layer, parts)
    for name in parts:
        setattr(layer, name, ffn if name == parts[0] else nn.Identity().train(layer.training))
    return ffn


class GatedFFN(nn.Module):
    """The dense FFN of which the experts of Mixtral and its relatives are copies: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        """Make the matrices, still to be filled.

        Args:
            hidden_size: d.
            width: f.
        """
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(..., d) of (..., d)."""
        return self.down_proj(F.silu(self.gate_proj(features)) * self.up_proj(features))


def put_dense_ffns(model: nn.Module, widths: Mapping[str, int], hidden_size: int) -> None:
    """Put dense FFNs where a class of transformers has its own experts, so that blocks can stand there.

    Args:
        model: on the device and of the dtype that the FFNs get; remembers ``widths`` as `dense_ffns`.
        widths: hidden units of the FFN at each path.
        hidden_size: d.

    Raises:
        AttributeError: the model has no module of that path.
    """
    like = next(model.parameters())
    for path, width in widths.items():
        model.get_submodule(path)
        with like.device:
            model.set_submodule(path, GatedFFN(hidden_size, width).to(dtype=like.dtype))
    model.dense_ffns = dict(widths)
