"""A checkpoint as the model that trained, in one process."""

from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.convert.hf.trained import trained_model


def load_model(checkpoint: str | Path) -> tuple[Any, dict[str, Any]]:
    """The model with its blocks and all experts, in fp32 and in evaluation mode, and the state of its run."""
    source = CheckpointSource(checkpoint)
    return trained_model(source), source.state
