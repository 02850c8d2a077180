"""A checkpoint of weights alone, from any source: for export, evaluation and starts, without an optimizer's state."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.checkpoints.files import FileFacts, write_file
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.manifest import Manifest
from mocte_ds.checkpoints.names import EXPERT_FILE, EXPERT_PARAMETER, MODEL_FILE
from mocte_ds.checkpoints.source import Source
from mocte_ds.moe.block import Block


def write_weights(source: Source, folder: Path, run: str) -> None:
    """Write every tensor of a source in the files in which a training would.

    Args:
        source: bf16 where it rounds to bf16; gates stay fp32.
        folder: of one checkpoint, empty.
        run: unique name of the run.

    Raises:
        OSError: a file could not be written.
    """
    state, files = source.state, {}
    banks = [(m.name, b) for m in source.model.modules() if isinstance(m, Block) for b in range(len(m.banks))]
    names: dict[str, list[str]] = {MODEL_FILE: []}
    for name in source.shapes:
        found = EXPERT_PARAMETER.fullmatch(name)
        place = (banks.index((found[1], int(found[2]))), found[3]) if found else None
        file = EXPERT_FILE.format(layer=place[0], expert=place[1]) if place else MODEL_FILE
        names.setdefault(file, []).append(name)
    client = {"model": state["model"], "tokenizer": state["tokenizer"], "tokens": state["tokens"]}
    for file, members in names.items():
        content: dict[str, Any] = {name: _stored(source, name) for name in members}
        if file == MODEL_FILE:
            content = {"module": content, "global_steps": state["step"], **(client if state["mocte"] is None else {})}
        files[file] = _write(folder / file, content)
    if state["mocte"] is not None:
        mocte = {"config": {**state["mocte"], "ep_size": 1}, "blocks": state["blocks"], "tokens": state["tokens"]}
        files[STATE_FILE] = _write(folder / STATE_FILE, {"mocte": mocte, "client_state": client})
    Manifest(run, state["step"], 1, files).write(folder)


def _write(path: Path, content: dict[str, Any]) -> FileFacts:
    try:
        return write_file(path, content)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(str(error)) from error


def _stored(source: Source, name: str) -> Tensor:
    tensor = source.read(name)
    narrow = source.dtype == "bf16" and tensor.is_floating_point() and ".gate." not in name
    return tensor.to(torch.bfloat16) if narrow else tensor
