"""The weights of a Hugging Face folder under the names of its class; read one at a time, never pickles."""

import re
from pathlib import Path

import torch
from torch import Tensor

from mocte_ds.convert.hf.shards import INDEX_FILE, SINGLE_FILE, Shards
from mocte_ds.errors import CheckpointError

# What files of older versions hold beside the weights: tables that are computed anew.
COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def require_weights(folder: Path) -> None:
    """Refuse a folder without safetensors.

    Raises:
        CheckpointError: pickles only, or nothing.
    """
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = (
            f"its weights are pickles ({pickles[0]}), which run code when they are opened and are never opened "
            "here; store the model as safetensors (save_pretrained) on a machine that may run them"
            if pickles
            else "its weights are missing"
        )
        raise CheckpointError(f"{folder} cannot be loaded: it holds neither {SINGLE_FILE} nor {INDEX_FILE}: {found}.")


class Folder:
    """What :class:`mocte_ds.convert.hf.shards.Shards` is, for a folder that others have written."""

    def __init__(self, folder: Path, architecture: str) -> None:
        """Look into every file.

        Args:
            folder: only read.
            architecture: name of its class.

        Raises:
            CheckpointError: pickles only, a file that is missing, truncated or renamed, or numbers of another kind than
                fp32, bf16 and fp16.
        """
        self.folder = folder
        require_weights(folder)
        self._shards = Shards(folder)
        kept = [name for name in self._shards.files if not COMPUTED.fullmatch(name)]
        # The first files of GPT-2 leave the prefix out.
        bare = architecture == "GPT2LMHeadModel" and not any(name.startswith("transformer.") for name in kept)
        self._stored = {f"transformer.{name}" if bare else name: name for name in kept}
        self.files = {name: self._shards.files[stored] for name, stored in self._stored.items()}
        """File of each tensor."""
        self.blanks: dict[str, Tensor] = {}
        """Each tensor without its numbers."""
        for name, stored in self._stored.items():
            kind, shape = self._shards.outline(stored)
            if kind not in FLOATS:
                raise CheckpointError(
                    f"{folder / self.files[name]}: {name} is stored as {kind}; {', '.join(FLOATS)} are supported."
                )
            try:
                self.blanks[name] = torch.empty(shape, dtype=FLOATS[kind], device="meta")
            except (RuntimeError, TypeError, OverflowError) as error:
                raise CheckpointError(
                    f"{folder / self.files[name]}: {name} has a shape that no tensor has: {str(shape)[:80]}."
                ) from error

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: its file is damaged.
        """
        return self._shards.read(self._stored[name])
