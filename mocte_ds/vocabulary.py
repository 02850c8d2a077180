"""Batches are looked at where they enter the model: what is wrong with them fails deep inside or never."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.dist.collectives import first_problem
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import DataError

_IGNORED = -100


class Vocabulary:
    """How many ids a model has, and whether a batch keeps to them and has something to learn."""

    def __init__(self, model: nn.Module, every: int, axis: Axis) -> None:
        """Find the model's token embedding; nothing is looked at where it has none.

        Args:
            model: before it is wrapped.
            every: optimizer steps between two looks at batches on a GPU, which wait for the device.
            axis: the ranks that stop together.
        """
        self.size, self._every, self._next, self._axis = embedding_size(model), every, 0, axis

    def look(self, args: tuple, kwargs: Mapping[str, Any], step: int, trains: bool = False) -> None:
        """Check the ids and labels of a batch: always on a CPU, at some steps on a GPU (collective if it trains).

        Args:
            args: of the model's call.
            kwargs: of the model's call; `input_ids`, or else the first of ``args``, holds the ids.
            step: optimizer steps done.
            trains: whether the pass is one that trains; then the batch must have a label.

        Raises:
            DataError: on all ranks where the pass trains: the batch is empty, an id is negative or too large, or every
                label is -100: the mean loss of no token is NaN, and so is every weight after the step.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.size is None or not isinstance(ids, Tensor) or ids.is_floating_point():
            return
        if ids.device.type != "cpu":
            if step < self._next:
                return
            self._next = step + self._every
        problem = self._problem(ids, kwargs.get("labels") if trains else None)
        # Passes that train come on all ranks together.
        problem = first_problem(problem, self._axis) if trains else problem
        if problem is not None:
            raise DataError(f"step {step + 1}: {problem}")

    def _problem(self, ids: Tensor, labels: Any) -> str | None:
        """What is wrong with a batch."""
        if not ids.numel():
            return f"the batch is empty, input_ids are {tuple(ids.shape)}; leave it out."
        least, most = (int(value) for value in torch.aminmax(ids))
        if least < 0 or most >= (self.size or 0):
            return (
                f"a token id is {least if least < 0 else most}, and the model's embedding has the ids 0 to "
                f"{(self.size or 0) - 1}. Take the tokenizer that belongs to the model, or a model with a larger "
                "vocabulary; padding needs an id too."
            )
        if isinstance(labels, Tensor) and labels.numel() and bool((labels == _IGNORED).all()):
            return (
                f"every label of a micro-batch of {labels.shape[0]} sequences is {_IGNORED}, so its mean loss is "
                "0 / 0. Leave such micro-batches out, on all ranks alike, or make them larger."
            )
        return None


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
