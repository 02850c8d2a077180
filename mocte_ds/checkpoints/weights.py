"""A checkpoint of weights alone, written tensor by tensor: for export, evaluation and starts, without moments."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.disk_tensors import DiskTensor, TensorFile
from mocte_ds.checkpoints.files import write_file
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import EXPERT_FILE, EXPERT_PARAMETER, MODEL_FILE, is_gate
from mocte_ds.checkpoints.source import NARROW, Source
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, running_state
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.ownership.manifest import Manifest


@dataclass(frozen=True)
class Made(DiskTensor):
    """A tensor that is made only while it is written."""

    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Make it.

        Raises:
            CheckpointError: another shape or dtype was promised.
        """
        tensor = self.make()
        if tuple(tensor.shape) != self.shape or tensor.dtype is not self.dtype:
            raise CheckpointError(
                f"a tensor {tuple(tensor.shape)} {tensor.dtype} was promised as {self.shape} {self.dtype}."
            )
        return tensor

    def blocks(self) -> Iterator[Any]:
        """Its bytes; raises as :meth:`read` does."""
        yield memoryview(self.read().contiguous().reshape(-1).view(torch.uint8).numpy())


Tensors = dict[str, Made | Tensor]
"""Every tensor of a model by its name."""


def tensors_of(source: Source) -> Tensors:
    """The weights of a source, in the dtypes of a training: where it rounds to bf16, all but gates and integers."""
    found: Tensors = {}
    for name, like in running_state(source.model).items():
        narrow = source.dtype in NARROW and like.is_floating_point() and not is_gate(name)
        dtype = NARROW[source.dtype] if narrow else torch.float32 if like.is_floating_point() else like.dtype
        found[name] = Made(dtype, tuple(like.shape), (), partial(_read, source, name, dtype))
    return found


def write_weights(folder: Path, run: str, model: nn.Module, tensors: Tensors, state: dict[str, Any]) -> None:
    """Write every tensor in the files in which a training would.

    Args:
        folder: of one checkpoint, empty.
        run: unique name of the run.
        model: with its blocks in their modes; its weights are not looked at.
        tensors: its weights.
        state: as of :class:`mocte_ds.checkpoints.source.Source`.

    Raises:
        OSError: a file could not be written.
        CheckpointError: a tensor cannot be made.
    """
    files: dict[str, FileFacts] = {}
    banks = [(m.name, b) for m in model.modules() if isinstance(m, Block) for b in range(len(m.banks))]
    contents: dict[str, dict[str, Any]] = {MODEL_FILE: {}}
    for name, tensor in tensors.items():
        found = EXPERT_PARAMETER.fullmatch(name)
        file = MODEL_FILE
        if found:
            file = EXPERT_FILE.format(layer=banks.index((found[1], int(found[2]))), expert=found[3])
        contents.setdefault(file, {})[name] = tensor
    base = state["base"]
    client = {"base": base, "tokenizer": state["tokenizer"], "tokens": state["tokens"]}
    dense = client if state["mocte"] is None else {}
    contents[MODEL_FILE] = {"module": contents[MODEL_FILE], "global_steps": state["step"], **dense}
    for file, content in contents.items():
        files[file] = _write(folder / file, TensorFile(content))
    if state["mocte"] is not None:
        mocte = {"config": {**state["mocte"], "ep_size": 1}, "blocks": state["blocks"], "tokens": state["tokens"]}
        files[STATE_FILE] = _write(folder / STATE_FILE, {"mocte": mocte, "base": base, "client_state": client})
    Manifest(run, state["step"], 1, files).write(folder)


def _write(path: Path, content: Any) -> FileFacts:
    try:
        return write_file(path, content)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(str(error)) from error


def _read(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    return source.read(name).to(dtype)
