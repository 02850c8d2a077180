"""Holds a written distributed checkpoint against the trained model: every tensor, and the logits."""

from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.closeness import require_close
from mocte_ds.convert.hf.trained import trained_model
from mocte_ds.convert.hf.trained_check import COMPARED_SHAPE, decided_logits
from mocte_ds.convert.megatron import folder as files
from mocte_ds.convert.megatron.gpt_model import build, fill, run
from mocte_ds.convert.megatron.settings import Settings
from mocte_ds.convert.megatron.tensor_map import Pair
from mocte_ds.errors import CheckpointError


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
    shape = (COMPARED_SHAPE[0], min(COMPARED_SHAPE[1], sizes["max_sequence_length"]))
    ids = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    found = run(fill(build(settings), tensors), ids)
    del tensors  # the next model needs the memory
    logits, decided = decided_logits(trained_model(source), ids)
    return {
        "parameters": parameters,
        "tensors_compared": len(pairs),
        "experts_compared": sum(block.num_experts for block in source.emerged),
        "logit_difference": require_close(found[decided], logits[decided], "logits in megatron-core"),
    }
