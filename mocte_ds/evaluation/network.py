"""A Hugging Face folder as a model and a tokenizer that are scored."""

from pathlib import Path
from typing import Any

from torch import nn

from mocte_ds.convert.hf.load import ONLY_LOCAL, load_model, refusing
from mocte_ds.errors import CheckpointError
from mocte_ds.json_files import read_object


def load_network(folder: Path) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        folder: see :func:`mocte_ds.convert.hf.load.load_model`.

    Returns:
        The model on the CPU, and the tokenizer.

    Raises:
        CheckpointError: as there, or the tokenizer is missing, damaged or of another model.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not an exported model: {name} is missing; tools/export_hf.py makes one."
            )
    model = load_model(folder)
    read_object(folder / "tokenizer_config.json", CheckpointError, foreign=True)
    with refusing(folder):
        tokenizer = folder_tokenizer(folder)
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {embeddings} embeddings: one of them "
            "belongs to another model."
        )
    return model, tokenizer


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **ONLY_LOCAL)
