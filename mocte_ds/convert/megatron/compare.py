"""Holds a written distributed checkpoint against the trained model: every tensor, and the logits."""

from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.closeness import MARGIN, margins, require_close
from mocte_ds.convert.hf.trained import trained_model
from mocte_ds.convert.megatron.gpt_model import run
from mocte_ds.convert.megatron.tensor_map import Pair
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode

_PROBE = (4, 64)


def compare(source: Source, pairs: list[Pair], model: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Compare in fp32 (within the groups of megatron-core).

    Args:
        source: the trained model, with the weights rounded as they were written.
        pairs: what was to be written.
        model: GPTModel with ``tensors`` as its weights.
        tensors: as they were read back.

    Returns:
        Facts: tensors_compared, experts_compared, logit_difference (relative to the largest logit).

    Raises:
        CheckpointError: a tensor was changed, so that an expert may stand in another one's place, or outputs differ by
            more than rounding.
    """
    for pair in pairs:
        if tensors[pair.name].dtype is not torch.float32 or not torch.equal(tensors[pair.name], pair.tensor(source)):
            raise CheckpointError(f"the weight {pair.name} was lost or changed on its way through the file.")
    shape = (_PROBE[0], min(_PROBE[1], model.max_sequence_length))
    ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    trained = trained_model(source)
    blocks = [m for m in trained.modules() if isinstance(m, Block) and m.mode is not BlockMode.WARMUP]
    logits, decided = _decided_logits(trained, blocks, ids)
    if decided.float().mean() < 0.25:
        raise CheckpointError(
            "some gate has experts with the same row, between which rounding decides; such a model cannot be compared. "
            "Rows that training has not told apart yet are the usual reason: take a checkpoint of a later step."
        )
    difference = require_close(run(model, ids)[decided], logits[decided], "logits in megatron-core")
    experts = sum(block.num_experts for block in blocks)
    return {"tensors_compared": len(pairs), "experts_compared": experts, "logit_difference": difference}


@torch.no_grad()
def _decided_logits(model: nn.Module, blocks: list[Block], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V), and (B, T) whether a position and all before it are clear of every gate's boundaries."""
    decided = torch.ones(ids.shape, dtype=torch.bool)

    def look(block: Block, inputs: tuple[Tensor, ...]) -> None:
        decided.logical_and_(margins(block, inputs[0].view(*ids.shape, -1)) > MARGIN)

    hooks = [block.register_forward_pre_hook(look) for block in blocks]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    # Attention carries a token's other expert to all later positions.
    return logits, decided.long().cummin(dim=1).values.bool()
