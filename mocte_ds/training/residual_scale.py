"""Smaller first weights where layers write into the residual stream, so that its variance does not grow with depth."""

from typing import Any

import torch
from torch import nn

_OUTPUTS = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "fc_out", "dense_4h_to_h")
_DENSE = ("attention.dense", "self_attention.dense", "self_attn.dense")
"""What transformers call the matrices whose output is added to the residual stream; `w2` of older mixtures is not among
them. A class with other names keeps the weights that it draws."""


@torch.no_grad()
def scale_residual_outputs(module: nn.Module, config: Any) -> list[str]:
    """Multiply first weights of residual outputs by 1 / sqrt(2 layers) (Radford et al., GPT-2, 2019).

    Without it the quickstart's features have no clusters before the deadline of emergence. Classes that draw them so by
    themselves (GPT-2, nanochat) are left alone: their weights are that much smaller than others already.

    Args:
        module: a model of transformers or a layer of one, as its class has drawn it; a second call changes nothing.
        config: of the model.

    Returns:
        Names of the parameters that were changed.
    """
    config = config.get_text_config()
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None)
    if getattr(config, "rescale_prenorm_residual", False):
        return []  # the class does it
    layers = getattr(config, "num_hidden_layers", None)
    if not std or not layers:
        return []
    scale, changed = (2 * layers) ** -0.5, []
    for name, parameter in module.named_parameters():
        path = name.removesuffix(".weight")
        if parameter.dim() >= 2 and (path.endswith(_DENSE) or path.rpartition(".")[2] in _OUTPUTS):
            # Between the two possible deviations, which are a factor of 1.4 or more apart.
            if parameter.std() > std * scale**0.5:
                parameter.mul_(scale)
                changed.append(name)
    return changed
