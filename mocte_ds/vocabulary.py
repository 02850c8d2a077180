"""Batches are looked at where they enter the model: what is wrong with them fails deep inside or never."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.errors import DataError

_IGNORED = -100


class Vocabulary:
    """How many ids a model has, and whether a batch keeps to them and has something to learn."""

    def __init__(self, model: nn.Module, every: int) -> None:
        """Find the model's token embedding; nothing is looked at where it has none.

        Args:
            model: before it is wrapped.
            every: optimizer steps between two looks at batches on a GPU, which wait for the device.
        """
        self.size, self._every, self._next = embedding_size(model), every, 0

    def look(self, args: tuple, kwargs: Mapping[str, Any], step: int, trains: bool = False) -> None:
        """Check the ids and labels of a batch: always on a CPU, at some steps on a GPU.

        Args:
            args: of the model's call.
            kwargs: of the model's call; `input_ids`, or else the first of ``args``, holds the ids.
            step: optimizer steps done.
            trains: whether the pass is one that trains; then the batch must have a label.

        Raises:
            DataError: the batch is empty, an id is negative or too large, or every label is -100: the mean loss of no
                token is NaN, and so is every weight after the step.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.size is None or not isinstance(ids, Tensor) or ids.is_floating_point():
            return
        if not ids.numel():
            raise DataError(f"step {step + 1}: the batch is empty, input_ids are {tuple(ids.shape)}; leave it out.")
        if ids.device.type != "cpu":
            if step < self._next:
                return
            self._next = step + self._every
        least, most = (int(value) for value in torch.aminmax(ids))
        if least < 0 or most >= self.size:
            raise DataError(
                f"step {step + 1}: a token id is {least if least < 0 else most}, and the model's embedding has the ids "
                f"0 to {self.size - 1}. Take the tokenizer that belongs to the model, or a model with a larger "
                "vocabulary; padding needs an id too."
            )
        labels = kwargs.get("labels")
        if trains and isinstance(labels, Tensor) and labels.numel() and bool((labels == _IGNORED).all()):
            raise DataError(
                f"step {step + 1}: every label of a micro-batch of {labels.shape[0]} sequences is {_IGNORED}, so its "
                "mean loss is 0 / 0. Leave such micro-batches out, on all ranks alike, or make them larger."
            )


def embedding_size(model: nn.Module) -> int | None:
    """Rows of the token embedding: what the model calls its input embeddings, or else its first nn.Embedding."""
    found = None
    if hasattr(model, "get_input_embeddings"):
        try:
            found = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            found = None
    if not isinstance(found, nn.Embedding):
        found = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    return None if found is None else found.num_embeddings
