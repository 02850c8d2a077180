"""Holds a written distributed checkpoint against the trained model: every tensor, and the logits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.closeness import MARGIN, margins, require_close
from mocte_ds.convert.hf.trained import trained_model
from mocte_ds.convert.megatron import folder as files
from mocte_ds.convert.megatron.gpt_model import build, fill, run
from mocte_ds.convert.megatron.settings import Settings
from mocte_ds.convert.megatron.tensor_map import Pair
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode

_PROBE = (4, 64)


def compare(source: Source, settings: Settings, pairs: list[Pair], folder: Path) -> dict[str, Any]:
    """Read a folder back and compare it in fp32 with what was to be written (within the groups of megatron-core).

    Args:
        source: the trained model, with the weights rounded as they were written.
        settings: of GPTModel.
        pairs: its tensors.
        folder: as it was written.

    Returns:
        Facts: parameters, tensors_compared, experts_compared, logit_difference (relative to the largest logit).

    Raises:
        CheckpointError: a tensor was changed, so that an expert may stand in another one's place, or outputs differ by
            more than rounding.
    """
    tensors = files.read(build(settings), folder)
    for pair in pairs:
        if tensors[pair.name].dtype is not torch.float32 or not torch.equal(tensors[pair.name], pair.tensor(source)):
            raise CheckpointError(f"the weight {pair.name} was lost or changed on its way through the file.")
    sizes, parameters = settings.gpt_model, sum(tensor.numel() for tensor in tensors.values())
    shape = (_PROBE[0], min(_PROBE[1], sizes["max_sequence_length"]))
    ids = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    found = run(fill(build(settings), tensors), ids)
    del tensors  # the next model needs the memory
    trained = trained_model(source)
    blocks = [m for m in trained.modules() if isinstance(m, Block) and m.mode is not BlockMode.WARMUP]
    logits, decided = _decided_logits(trained, blocks, ids)
    if decided.float().mean() < 0.25:
        raise CheckpointError(
            "some gate has experts with the same row, between which rounding decides; such a model cannot be compared. "
            "Rows that training has not told apart yet are the usual reason: take a checkpoint of a later step."
        )
    return {
        "parameters": parameters,
        "tensors_compared": len(pairs),
        "experts_compared": sum(block.num_experts for block in blocks),
        "logit_difference": require_close(found[decided], logits[decided], "logits in megatron-core"),
    }


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
