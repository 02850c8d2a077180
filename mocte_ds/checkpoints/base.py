"""Which model a checkpoint holds, found out without building anything."""

from pathlib import Path
from typing import Any

from mocte_ds.base_model import require_base
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import MODEL_FILE
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.values import read_plain
from mocte_ds.errors import CheckpointError


def base_in_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """What :func:`mocte_ds.base_model.base_facts` has said of the model.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag.

    Raises:
        CheckpointError: it is none, or does not say which model it holds.
    """
    folder = find_tag(checkpoint)
    state = folder / STATE_FILE
    content = read_plain(state if state.is_file() else folder / MODEL_FILE, mmap=True)
    client = content.get("client_state", content) if isinstance(content, dict) else {}
    refuse_decoder(client, folder)
    kept = content if state.is_file() and isinstance(content, dict) else client
    return require_base(kept.get("base") if isinstance(kept, dict) else None, folder)


def refuse_decoder(client: Any, folder: Path) -> None:
    """Refuse a checkpoint of a class that is gone.

    Args:
        client: what a run kept beside its weights.
        folder: names it, for messages.

    Raises:
        CheckpointError: it is one.
    """
    if isinstance(client, dict) and isinstance(client.get("model"), dict) and "style" in client["model"]:
        raise CheckpointError(
            f"{folder} holds a decoder of an earlier version of mocte_ds, which this version does not load; export it "
            "with that version, and start from the folder with model.pretrained or tools/import_hf.py."
        )
