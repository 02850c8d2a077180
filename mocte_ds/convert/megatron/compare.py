"""Holds a written distributed checkpoint against the trained model: every tensor, every expert, and the logits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.closeness import MARGIN, margins, require_close
from mocte_ds.convert.hf.compare import PROBE
from mocte_ds.convert.megatron.model import run
from mocte_ds.convert.megatron.pairs import Pair
from mocte_ds.errors import CheckpointError
from mocte_ds.models.layers import rotary_angles
from mocte_ds.moe.block import Block
from mocte_ds.moe.forward import ForwardState

_ROWS = 16  # features that an expert is compared at


def compare(source: Source, pairs: list[Pair], model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Compare in fp32 (within the groups of megatron-core).

    Args:
        source: the trained model, with the weights rounded as they were written.
        pairs: what was to be written.
        model: GPTModel with ``tensors`` as its weights.
        tensors: as they were read back.

    Returns:
        Facts: tensors_compared, experts_compared, logit_difference (relative to the largest logit).

    Raises:
        CheckpointError: a tensor is missing, too much or changed, an expert stands in another one's place, or outputs
            differ by more than rounding.
    """
    different = {pair.name for pair in pairs} ^ {name for name, _ in model.named_parameters()}
    if different:
        raise CheckpointError(f"megatron-core's model and the conversion do not agree on {min(different)}.")
    for pair in pairs:
        expected = pair.tensor(source)
        if tensors[pair.name].dtype is not torch.float32 or not torch.equal(tensors[pair.name], expected):
            raise CheckpointError(f"the weight {pair.name} was lost or changed on its way through the file.")
    batch, length = PROBE[0], min(PROBE[1], source.config.max_positions)
    ids = torch.randint(source.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    logits, decided, experts = _ours(source, model, ids)
    if decided.float().mean() < 0.25:
        raise CheckpointError(
            "some gate has experts with the same row, between which rounding decides; such a model cannot be compared. "
            "Rows that training has not told apart yet are the usual reason: take a checkpoint of a later step."
        )
    difference = require_close(run(model, ids)[decided], logits[decided], "logits in megatron-core")
    return {"tensors_compared": len(pairs), "experts_compared": experts, "logit_difference": difference}


@torch.no_grad()
def _ours(source: Source, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Our logits, layer by layer, on the way comparing the experts.

    Returns:
        Logits (B, T, V); (B, T) whether a position and all before it are clear of every gate's boundaries; experts.
    """
    x, experts = source.read("model.embed_tokens.weight")[ids], 0
    decided = torch.ones(ids.shape, dtype=torch.bool)
    rotation = rotary_angles(source.config, ids.shape[1], x)
    for i in range(source.config.num_layers):
        layer = source.part(f"model.layers.{i}")
        if isinstance(layer.mlp, Block):
            features: list[Tensor] = []
            hook = layer.mlp.register_forward_pre_hook(
                lambda _block, inputs, features=features: features.extend(inputs)
            )
            with layer.mlp.context.running(ForwardState(ids, layer.mlp.context.eod_id)):
                x = layer(x, rotation)
                hook.remove()
                decided &= margins(layer.mlp, features[0]) > MARGIN
            experts += _compare_experts(layer.mlp, model.decoder.layers[i].mlp.experts.local_experts)
        else:
            x = layer(x, rotation)
    # Attention carries a token's other expert to all positions behind it.
    decided = decided.cummin(dim=1).values
    weight = source.read("model.embed_tokens.weight" if source.config.tied else "lm_head.weight")
    return F.linear(source.part("model.norm")(x), weight), decided, experts


def _compare_experts(block: Block, theirs: nn.ModuleList) -> int:
    """Every expert by its number, since few texts may lead to it."""
    rows = torch.randn(_ROWS, block.hidden_size, generator=torch.Generator().manual_seed(1))
    for k, (mine, other) in enumerate(zip(block.banks[0].local_experts, theirs, strict=True)):
        require_close(other(rows, torch.ones(_ROWS))[0], mine(rows), f"outputs of expert {k} of {block.name}")
    return len(theirs)
