"""A checkpoint as one model in one process: for evaluation and inspection."""

from pathlib import Path
from typing import Any

from torch import nn

from mocte_ds.checkpoints.source import StoredSource


def load_model(checkpoint: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the decoder of a checkpoint with all its experts, in fp32, without any process group.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag; only read.

    Returns:
        The model in evaluation mode, blocks in the checkpoint's modes; and the state: "step", "tokens", "model",
        "mocte" (None for a dense run), "blocks", "tokenizer".

    Raises:
        CheckpointError: missing, changed, damaged or unknown files; or it holds no decoder of ours.
        ConfigError: settings that this version does not know.
    """
    source = StoredSource(checkpoint)
    _ = source.config  # refuses a user's own model
    source.model.load_state_dict({name: source.read(name) for name in source.shapes}, assign=True)
    return source.model.eval(), source.state
