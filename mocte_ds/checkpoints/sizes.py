"""Which decoder a checkpoint holds, found out without building anything."""

from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.names import MODEL_FILE
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.plain import read_plain
from mocte_ds.errors import CheckpointError

_STATE_FILE = "mocte_state.pt"


def stored_sizes(checkpoint: str | Path) -> dict[str, Any]:
    """Values of DecoderConfig.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag.

    Raises:
        CheckpointError: it is none, or of another script than launch/pretrain.py.
    """
    folder = find_tag(checkpoint)
    own = folder / _STATE_FILE
    content = read_plain(own if own.is_file() else folder / MODEL_FILE, mmap=True)
    client = content.get("client_state", content) if isinstance(content, dict) else {}
    sizes = client.get("model") if isinstance(client, dict) else None
    if not isinstance(sizes, dict):
        raise CheckpointError(f"{folder} does not say which model it holds; only those of launch/pretrain.py do.")
    return dict(sizes)
