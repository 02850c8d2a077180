"""One layer at a time of an exported folder, loaded by transformers as a model of one layer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.convert.hf.dense import Layout
from mocte_ds.convert.hf.folder import Folder
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.errors import CheckpointError
from mocte_ds.json_files import read_object
from mocte_ds.shown import one_line

_EMBEDDING, _HEAD = (".embed_tokens.weight", ".wte.weight"), "lm_head.weight"


class Pieces:
    """An export as a user loads it, but never the whole of it."""

    def __init__(self, folder: Path, layout: Layout, shards: Shards | Folder | None = None) -> None:
        """Read the config and the names of the tensors.

        Args:
            folder: of the export, or one that was imported.
            layout: the class that it holds.
            shards: its tensors; None: the folder's files under their own names.

        Raises:
            CheckpointError: transformers do not read the config, or a file is damaged.
        """
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # one a layer

        self.folder, self.layout, self.shards = folder, layout, shards or Shards(folder)
        try:
            written = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self.values = read_object(folder / "config.json", CheckpointError, foreign=True)
            self.config_class = type(written)
        except Exception as error:  # transformers raise many types for a config that they do not know
            raise CheckpointError(f"transformers cannot load {folder}: {one_line(error)}") from error

    def layer(self, layer: int, dtype: torch.dtype, whole: bool = False) -> nn.Module:
        """A model whose only layer is this one.

        Args:
            layer: number.
            dtype: that it computes in.
            whole: with the embedding and the output matrix; otherwise with zeros for as few tokens as possible.

        Raises:
            CheckpointError: transformers cannot load it, or not everything of it.
        """
        changes: dict[str, Any] = {"num_hidden_layers": 1, **self.layout.one_layer(layer)}
        if not whole:
            changes |= {
                "vocab_size": self.layout.least_vocabulary,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": None,
            }
        values = {key: value for key, value in self.values.items() if key not in ("auto_map", "layer_types")}
        for name, other in getattr(self.config_class, "attribute_map", {}).items():
            if name in changes:
                changes[other] = changes.pop(name)
        try:
            config = self.config_class.from_dict({**values, **changes})
            model, info = self.layout.model_class().from_pretrained(
                None,
                config=config,
                state_dict=self._tensors(layer, whole),
                dtype=dtype,
                output_loading_info=True,
            )
        except CheckpointError:
            raise
        except Exception as error:  # transformers raise many types for tensors that do not fit
            raise CheckpointError(f"transformers cannot load {self.folder}: {one_line(error)}") from error
        lost = {key: [str(value) for value in values][:3] for key, values in info.items() if values}
        if lost:
            raise CheckpointError(f"transformers could not load everything of layer {layer} of {self.folder}: {lost}.")
        return model.eval()

    @torch.no_grad()
    def run(self, part: Any, *inputs: Any) -> Any:
        """Call a part of a model.

        Raises:
            CheckpointError: transformers' kernels do not take its sizes.
        """
        try:
            return part(*inputs)
        except RuntimeError as error:
            raise CheckpointError(
                f"transformers loads {self.folder} but cannot run it: {one_line(error)} (its kernels want a "
                "hidden_size that is a multiple of 4 in fp32 and of 8 in bf16)."
            ) from error

    def _tensors(self, layer: int, whole: bool) -> dict[str, Tensor]:
        own, first, tensors = f"{self.layout.layers}.{layer}.", f"{self.layout.layers}.0.", {}
        for name in self.shards.files:
            if name.startswith(own):
                tensors[first + name.removeprefix(own)] = self.shards.read(name)
            elif not name.startswith(f"{self.layout.layers}."):
                if not whole and (name.endswith(_EMBEDDING) or name == _HEAD):
                    tensors[name] = torch.zeros(self.layout.least_vocabulary, self.layout.config.hidden_size)
                else:
                    tensors[name] = self.shards.read(name)
        return tensors
