"""Converts a checkpoint to megatron-core's distributed format and back; a folder appears whole and checked, or not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.source import CheckpointSource, Source
from mocte_ds.checkpoints.weights import tensors_of, write_weights
from mocte_ds.convert.hf.output_folder import finished_folder, require_room
from mocte_ds.convert.megatron import folder as files
from mocte_ds.convert.megatron.compare import compare
from mocte_ds.convert.megatron.cpu import one_process
from mocte_ds.convert.megatron.gpt_model import build, fill
from mocte_ds.convert.megatron.run_record import MegatronSource, write_record
from mocte_ds.convert.megatron.settings import settings_of
from mocte_ds.convert.megatron.tensor_map import all_pairs, unused
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership import require_apart, require_outside_whole
from mocte_ds.ownership.durable import replace_text
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest

_TOOL = "to_megatron"


def to_megatron(
    checkpoint: str | Path, out: str | Path, dtype: str = "fp32", tell: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """Write a folder that megatron.core.dist_checkpointing loads into a GPTModel, whatever its parallelism.

    Args:
        checkpoint: folder of checkpoints or of one tag; only read.
        out: folder to write; must not exist.
        dtype: `fp32` or `bf16` weights; routers are stored in fp32 always.
        tell: called with a line for each stage.

    Returns:
        Facts: dtype, step, parameters, and what was compared (see mocte_ds.convert.megatron.compare).

    Raises:
        CheckpointError: the checkpoint is none, damaged, or not convertible (says what to change); the written model
            differs; the folder cannot be written.
        ConfigError: an unknown dtype, or an ``out`` that exists.
    """
    found = find_tag(checkpoint)
    target = _require_new(Path(out), found, dtype)
    tell(f"reading {found}")
    source = CheckpointSource(found, dtype)
    settings, manifest = settings_of(source, found), Manifest.read(found)
    pairs = all_pairs(source, settings)
    unused(source, pairs)  # says so before anything is written
    require_room(target, _size(source))
    with finished_folder(target, _TOOL) as pending, one_process():
        tell("writing for megatron-core")
        weights = {pair.name: pair.tensor(source).to(pair.dtype(source)) for pair in pairs}
        files.save(fill(build(settings), weights), pending, source.state["step"])
        del weights  # the next model needs the memory
        write_record(pending, source, settings, pairs, manifest)
        tell("comparing with the trained model")
        facts = compare(source, settings, pairs, pending)
    return {"dtype": dtype, "step": source.state["step"], **facts}


def from_megatron(
    folder: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    tell: Callable[[str], None] = lambda _text: None,
    settings: str | Path | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of weights alone, which the other tools read.

    Args:
        folder: that :func:`to_megatron` or a training with megatron-core wrote; only read.
        out: folder of checkpoints to write; must not exist.
        dtype: `fp32` or `bf16` weights; routers are stored in fp32 always.
        tell: called with a line for each stage.
        settings: the folder that :func:`to_megatron` wrote, if ``folder`` is of the training that began with it.

    Returns:
        Facts: tag, dtype, step (of the checkpoint that was converted once), tensors_compared.

    Raises:
        CheckpointError: the folder is none, incomplete, damaged, of another model, or holds code; or the checkpoint
            cannot be written.
        ConfigError: an unknown dtype, or an ``out`` that exists.
    """
    found = Path(folder).absolute()
    if not found.is_dir():
        raise CheckpointError(f"{found} is not a folder.")
    target = _require_new(Path(out), found, dtype)
    tell(f"reading {found}")
    if (found / MANIFEST_FILE).is_file():  # a training with megatron-core writes none
        require_whole(found, Manifest.read(found).files)
    source = MegatronSource(Path(settings).absolute() if settings else found, dtype)
    tag = f"step{source.state['step']}"
    require_room(target, _size(source))
    with finished_folder(target, _TOOL) as pending:
        with one_process():
            source.take(files.read(build(source.settings), found))
        tell(f"writing {tag}")
        (pending / tag).mkdir()
        write_weights(pending / tag, source.manifest.run, source.model, tensors_of(source), source.state)
        replace_text(pending / "latest", tag)
        tell("comparing")
        written = CheckpointSource(pending / tag)
        for name in source.shapes:
            if not torch.equal(written.read(name), source.read(name)):
                raise CheckpointError(f"the weight {name} was lost or changed on its way through the file.")
    return {"tag": tag, "dtype": dtype, "step": source.state["step"], "tensors_compared": len(source.shapes)}


def _size(source: Source) -> int:
    """About the bytes of all tensors."""
    numbers = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    return numbers * (2 if source.dtype == "bf16" else 4)


def _require_new(out: Path, source: Path, dtype: str) -> Path:
    """``out`` as a full path, if nothing is there."""
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"dtype = {dtype!r} is not one of ['fp32', 'bf16'].")
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; remove it or name another folder.")
    require_apart(out, source)
    require_outside_whole(out.parent)
    return out.absolute().resolve()
