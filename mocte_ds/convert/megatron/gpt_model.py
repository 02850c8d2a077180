"""megatron-core's GPTModel on a CPU: made from its settings, filled with weights, and run."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.convert.megatron.settings import Settings
from mocte_ds.errors import CheckpointError


def build(settings: Settings, **changes: Any) -> nn.Module:
    """The model in fp32 on a CPU, in evaluation mode, its weights not set (within the groups of megatron-core).

    Args:
        settings: of the model.
        **changes: of TransformerConfig, such as expert_model_parallel_size.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    # The other dispatchers need CUDA's streams.
    config = TransformerConfig(
        **settings.transformer_config,
        activation_func=F.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        moe_token_dispatcher_type="allgather",
        **changes,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(config, spec, **settings.gpt_model).eval()


def fill(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The model with other weights.

    Args:
        model: GPTModel; changed in place.
        tensors: by parameter; each keeps its own dtype.

    Raises:
        CheckpointError: they are not the tensors of the model.
    """
    parameters = dict(model.named_parameters())
    if different := parameters.keys() ^ tensors.keys():
        raise CheckpointError(f"megatron-core's model and the conversion do not agree on {min(different)}.")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(parameter.shape)} in megatron-core's model and {tuple(tensors[name].shape)} here: "
                "the weights are not those of the config."
            )
        parameter.data = tensors[name]
    return model


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of ids (B, T), in evaluation mode, on a CPU."""
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(ids, positions, future)
