"""The fp32 weights of a checkpoint, experts of all ranks among them, where DeepSpeed's zero_to_fp32 cannot read it."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.disk_tensors import DiskTensor, TensorFile, read_disk_tensors
from mocte_ds.checkpoints.files import replace_file
from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.names import EXPERT_NAME, PARTITIONED_MODEL_FILE
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.reshaping.optimizer import CheckpointOptimizer
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.checkpoints.values import only_plausible, require_keys
from mocte_ds.checkpoints.weights import Made
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode
from mocte_ds.moe.idle import free
from mocte_ds.ownership import require_outside_whole
from mocte_ds.ownership.manifest import Manifest
from mocte_ds.shown import one_line

WEIGHTS_FILE = "pytorch_model.bin"


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | int | None = None, exclude_frozen_parameters: bool = False
) -> dict[str, Tensor]:
    """Every weight and buffer in fp32, under the names of a model whose experts lie on one rank.

    What trains comes from the optimizer's master weights; what is frozen in the precision in which it was trained. What
    does not run is left out: experts that have not emerged, and FFNs that experts have replaced.

    Args:
        checkpoint_dir: a folder of checkpoints, or the folder of one tag; only read.
        tag: name of the checkpoint; None: the one that `latest` names.
        exclude_frozen_parameters: leave out parameters that do not train.

    Raises:
        CheckpointError: missing or damaged, or of ZeRO stage 3.
    """
    return {name: made.read() for name, made in _weights(checkpoint_dir, tag, exclude_frozen_parameters).items()}


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    tag: str | int | None = None,
    exclude_frozen_parameters: bool = False,
) -> Path:
    """Write :func:`get_fp32_state_dict_from_zero_checkpoint` as one file, a tensor at a time.

    Args:
        checkpoint_dir: as there.
        output_dir: gets `pytorch_model.bin`, which must not be there.
        tag: as there.
        exclude_frozen_parameters: as there.

    Returns:
        The file, for `torch.load(path, weights_only=True)`.

    Raises:
        CheckpointError: as there; or the file (or a link of its name) is there already, or cannot be written.
        NotOurs: the folder is the whole output of a tool, or lies in one.
    """
    path = Path(output_dir) / WEIGHTS_FILE
    require_outside_whole(path.parent)
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is there already; name another folder to write to.")
    weights = _weights(checkpoint_dir, tag, exclude_frozen_parameters)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, TensorFile(weights))
    except (OSError, RuntimeError) as error:  # the latter is what torch.save makes of a full disk
        raise CheckpointError(f"could not write {path}: {error}. Make room or choose another folder.") from error
    return path


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | int | None = None
) -> nn.Module:
    """Give a model the fp32 weights of a checkpoint, every one of them, and its blocks their modes.

    Args:
        model: with the blocks of the run, all experts local (`mocte_ds.moe.attach` with ep_size 1), no part freed.
        checkpoint_dir: as of :func:`get_fp32_state_dict_from_zero_checkpoint`.
        tag: as there.

    Raises:
        CheckpointError: as there; or the checkpoint is of another model.
    """
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    folder = _folder(checkpoint_dir, tag)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    with only_plausible(folder):
        entries = SavedCheckpoint(folder, Manifest.read(folder)).blocks
        if [entry["name"] for entry in entries] != [block.name for block in blocks]:
            raise CheckpointError(
                f"the checkpoint {folder} has the blocks {[entry['name'] for entry in entries]}, the model has "
                f"{[block.name for block in blocks]}."
            )
        for block, entry in zip(blocks, entries, strict=True):
            block.mode = BlockMode(entry["mode"])
            for path in block.idle:
                free(block.parts[path])
    try:
        model.float().load_state_dict(weights)
    except RuntimeError as error:
        text = one_line(error, 500)
        raise CheckpointError(f"the checkpoint {checkpoint_dir} does not fit the model: {text}") from error
    return model


def _folder(checkpoint: str | Path, tag: str | int | None) -> Path:
    return find_tag(checkpoint) if tag is None else Path(checkpoint) / str(tag)


def _weights(checkpoint: str | Path, tag: str | int | None, trained_only: bool) -> dict[str, Made]:
    folder = _folder(checkpoint, tag)
    manifest = require_whole(folder)
    with only_plausible(folder):
        return _weights_of(folder, manifest, trained_only)


def _weights_of(folder: Path, manifest: Manifest, trained_only: bool) -> dict[str, Made]:
    if PARTITIONED_MODEL_FILE in manifest.files:
        raise CheckpointError(
            f"{folder} is of ZeRO stage 3, whose master weights stay in their parts: use `mocte-ds export_hf`, or "
            "engine.save_16bit_model in the run."
        )
    written = SavedCheckpoint(folder, manifest)
    content = written.weights_alone
    if content is None:
        written.require_supported()
        content = written.model
    stored: dict[str, DiskTensor] = dict(content["module"])
    for name in sorted(filter(EXPERT_NAME.fullmatch, manifest.files)):
        stored.update(require_keys(read_disk_tensors(folder / name), (), folder / name))
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(written.idle)}
    found = {name: _made(tensor) for name, tensor in stored.items()}
    if written.precision is None:
        return found
    masters = _masters(CheckpointOptimizer(written), stored)
    masters |= {name: masters[other] for name, other in content["shared_params"].items() if other in masters}
    buffers = content["buffer_names"]
    return {
        name: masters.get(name, made)
        for name, made in found.items()
        if not trained_only or name in masters or name in buffers
    }


def _masters(optimizer: CheckpointOptimizer, stored: dict[str, DiskTensor]) -> dict[str, Made]:
    masters = {}
    for whole in optimizer.groups.values():
        for name, (start, numel) in whole.fragments.items():
            masters[name] = _made(replace(whole.master.flat(start, start + numel), shape=stored[name].shape))
    return masters


def _made(stored: DiskTensor) -> Made:
    """A tensor that is widened while it is read."""
    dtype = torch.float32 if stored.dtype.is_floating_point else stored.dtype
    make: Callable[[], Tensor] = partial(_read, stored, dtype)
    return Made(dtype, stored.shape, stored.pieces, make)


def _read(stored: DiskTensor, dtype: torch.dtype) -> Tensor:
    return stored.read().to(dtype)
