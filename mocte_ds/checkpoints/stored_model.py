"""Which model a checkpoint holds, found out without building anything."""

from pathlib import Path
from typing import Any

from mocte_ds.base_model import require_base
from mocte_ds.checkpoints.names import MODEL_FILE
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.plain import read_plain

_STATE_FILE = "mocte_state.pt"


def stored_model(checkpoint: str | Path) -> dict[str, Any]:
    """What :func:`mocte_ds.base_model.base_facts` has said of the model.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag.

    Raises:
        CheckpointError: it is none, or does not say which model it holds.
    """
    folder = find_tag(checkpoint)
    state = folder / _STATE_FILE
    content = read_plain(state if state.is_file() else folder / MODEL_FILE, mmap=True)
    client = content.get("client_state", content) if isinstance(content, dict) else {}
    kept = content if state.is_file() and isinstance(content, dict) else client
    return require_base(kept.get("base") if isinstance(kept, dict) else None, folder)
