"""Hidden units of an expert that are drawn anew when it emerges, from the dense FFN's own statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.remote_code.experts_mocte import in_out

# Shapes: d features, f hidden units.


@dataclass(frozen=True)
class Drawn:
    """New values of a part of one parameter."""

    mask: Tensor
    """Of the parameter's number of dimensions: which of its values are new."""
    values: Tensor
    """Of the parameter's shape, fp32."""

    def put(self, old: Tensor) -> Tensor:
        """A tensor of the parameter's shape with the new values in their places."""
        return torch.where(self.mask.to(old.device), self.values.to(old), old)

    def clear(self, old: Tensor) -> Tensor:
        """A tensor of the parameter's shape with zeros there, for moments."""
        return old.masked_fill(self.mask.to(old.device), 0.0)


@torch.no_grad()
def redraw(expert: nn.Module, dense: nn.Module, share: float, seed: int) -> dict[str, Drawn]:
    """Draw a share of an expert's hidden units: rows of the input matrices and columns of the output's.

    Drop-Upcycling (Nakamura et al., arXiv 2502.19261) with .5. With 1 and a dense FFN that has not trained the expert
    is one from scratch: the mean and the spread are those of the model's own initialisation. On the CPU in fp32, so
    that devices and types do not change the draw.

    Args:
        expert: of a form that :func:`ffn_shape` knows.
        dense: the FFN whose mean and spread, matrix by matrix, the values are drawn with.
        share: of the hidden units, in (0, 1].
        seed: another seed gives other units and unrelated values.

    Returns:
        By name of a parameter of the expert; the output's bias belongs to no hidden unit and is not among them.
    """
    shape, generator = ffn_shape(expert), torch.Generator().manual_seed(seed)
    assert shape is not None  # make_expert refuses others
    chosen = torch.zeros(shape.width, dtype=torch.bool)
    chosen[torch.randperm(shape.width, generator=generator)[: round(share * shape.width)]] = True
    found, sources = {}, dict(dense.named_parameters())
    for path in (*shape.inputs, shape.output):
        matrix = expert.get_submodule(path)
        is_output = path == shape.output
        units = chosen if is_output or not shape.fused else chosen.repeat(2)
        for name, parameter in matrix.named_parameters():
            if is_output and parameter.dim() == 1:
                continue
            along_rows = parameter.dim() == 1 or isinstance(matrix, nn.Linear) != is_output
            full = f"{path}.{name}"
            found[full] = Drawn(
                units if parameter.dim() == 1 else units[:, None] if along_rows else units[None],
                _like(sources[full], parameter.shape, generator),
            )
        assert in_out(matrix)[0 if is_output else 1] == len(units)
    return found


def _like(source: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal values with the mean and the spread of a tensor."""
    whole = source.detach().float().cpu()
    return torch.randn(shape, generator=generator) * whole.std(correction=0) + whole.mean()
