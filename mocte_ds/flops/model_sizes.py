"""What the FLOPs ledger needs to know of a model, read from the modules that are there."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mocte_ds.errors import MocteError
from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.moe.loose import gathered
from mocte_ds.remote_code.experts_mocte import ffn_of, is_matrix


@dataclass(frozen=True)
class LayerSizes:
    """Parameters of the matrices of one layer; every token is multiplied with each of them."""

    matrices: int
    """All of them."""
    ffn: int
    """Those of the FFN; 0 where the layer has none."""
    ffn_width: int
    """Hidden units of the FFN; 1 where its form is not known, so that it is not cut into parts."""
    ffn_output: int
    """The one that writes the FFN's output; 0 where it is not known."""


@dataclass(frozen=True)
class ModelSizes:
    """Of a dense model."""

    hidden_size: int
    """d."""
    query_size: int
    """Features of all queries of a token together, in one layer."""
    layers: tuple[LayerSizes, ...]
    outside: int
    """Parameters of the matrices outside of the layers: the output matrix."""
    tied: int
    """Those of them that are an embedding table, too."""
    recomputes: bool
    """Whether layers run again in the backward pass (activation checkpointing)."""

    @property
    def matrices(self) -> int:
        """Parameters that every token is multiplied with: all matrices, the output matrix too, no embedding lookup."""
        return sum(layer.matrices for layer in self.layers) + self.outside


def model_sizes(model: nn.Module, ffns: Collection[str] = ()) -> ModelSizes:
    """Read a model before blocks are put into it; one on the meta device will do.

    Matrices are nn.Linear and transformers' Conv1D. Attention is taken to be over all heads of the config in every
    layer, with values as wide as queries.

    Args:
        model: its layers stand in an nn.ModuleList, and its `config` has the heads.
        ffns: paths of the modules that become blocks; in other layers the largest module with the shape of an FFN is
            taken for it.

    Raises:
        MocteError: it has no list of layers, or its config says nothing of attention heads.
    """
    stack = layer_stack(model)
    inside = {id(part) for part in stack.modules()}
    blocks = {id(model.get_submodule(name)) for name in ffns}
    outside = [part for part in model.modules() if is_matrix(part) and id(part) not in inside]
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding) and id(part) not in inside]
    weights = [part.weight for part in outside] or tables[:1]  # without a matrix the first table gives the logits
    query_size, hidden_size = _attention(model)
    return ModelSizes(
        hidden_size=hidden_size,
        query_size=query_size,
        layers=tuple(_layer(layer, blocks) for layer in stack),
        outside=sum(_numel(weight) for weight in weights),
        tied=sum(_numel(weight) for weight in weights if any(weight is table for table in tables)),
        recomputes=_recomputes(model),
    )


def layer_stack(model: nn.Module) -> nn.ModuleList:
    """The layers of a model: its largest list of modules.

    Raises:
        MocteError: it has none.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise MocteError(f"{type(model).__name__} has no nn.ModuleList of layers, so that its FLOPs cannot be counted.")
    return max(lists, key=_parameters)


def _layer(layer: nn.Module, blocks: Collection[int]) -> LayerSizes:
    matrices = sum(_numel(part.weight) for part in layer.modules() if is_matrix(part))
    likely = {id(part): part for part in layer.modules() if id(part) in blocks or ffn_shape(part) is not None}
    # Its first matrix stands for an FFN that is not gathered yet.
    likely |= {id(layer.get_submodule(parts[0])): ffn_of(layer, parts) for parts in gathered(layer)}
    if not likely:
        return LayerSizes(matrices, 0, 1, 0)
    ffn = likely[max(likely, key=lambda number: (number in blocks, _parameters(likely[number])))]
    shape, inside = ffn_shape(ffn), sum(_numel(part.weight) for part in ffn.modules() if is_matrix(part))
    if shape is None:
        return LayerSizes(matrices, inside, 1, 0)
    return LayerSizes(matrices, inside, shape.width, _numel(ffn.get_submodule(shape.output).weight))


def _attention(model: nn.Module) -> tuple[int, int]:
    """Features of all queries, and of the residual stream."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, hidden_size = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(hidden_size, int):
        raise MocteError(
            f"the config of {type(model).__name__} has no num_attention_heads and hidden_size, so that the FLOPs of "
            "attention cannot be counted."
        )
    return heads * (getattr(config, "head_dim", None) or hidden_size // heads), hidden_size


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) is True for part in model.modules())


def _parameters(module: nn.Module) -> int:
    return sum(_numel(parameter) for parameter in module.parameters())


def _numel(parameter: torch.Tensor) -> int:
    """Of the whole parameter, also where ZeRO stage 3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())
