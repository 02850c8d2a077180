"""Holds the folder of a user's own model against what trained: every tensor, and the logits."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.base_model import longest_context
from mocte_ds.checkpoints.source import NARROW, Source
from mocte_ds.convert.hf.by_layer import ByLayer, load_by_layer
from mocte_ds.convert.hf.closeness import MARGIN, margins, require_close
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.convert.hf.trained import Target, quiet_transformers, tensor_of, trained_by_layer
from mocte_ds.convert.hf.user_keys import class_beside
from mocte_ds.errors import CheckpointError
from mocte_ds.json_files import read_object
from mocte_ds.moe.block import Block, BlockMode
from mocte_ds.ownership.checksums import SumsBeside
from mocte_ds.shown import one_line

COMPARED_SHAPE = (4, 64)
"""Sequences and tokens of the batch whose logits are compared."""


def compare_tensors(source: Source, target: Target, folder: Path) -> dict[str, str]:
    """Load a folder as a user does, in the dtype of its files, and hold every tensor against the trained model's.

    Args:
        source: the trained model, with the weights rounded as they were written.
        target: what it was written as.
        folder: the export.

    Returns:
        The checksum of every tensor in the files.

    Raises:
        CheckpointError: transformers do not load it, or a tensor is missing or changed.
    """
    loaded = _loaded(folder, NARROW.get(source.dtype, torch.float32), folder)
    blanks = loaded.model.state_dict(keep_vars=True)
    if different := blanks.keys() ^ target.names.keys():
        raise CheckpointError(f"{folder}: {min(different)} is in only one of two: the export and the trained model.")
    for name, ours in target.names.items():
        found, wanted = loaded.value(blanks[name]), tensor_of(source, ours)
        if found.dtype is not wanted.dtype or not torch.equal(found, wanted):
            raise CheckpointError(f"{folder}: the weight {name} was lost or changed on its way through the file.")
    shards = Shards(folder)
    with SumsBeside() as sums:
        for name in shards.files:
            sums.add(name, shards.read(name))
    return sums.found


def compare_logits(source: Source, folder: Path, beside: Path | None = None) -> float:
    """Load a folder as a user does, in fp32, and hold its logits against those of the model as it trains.

    Neither is in memory as a whole: a layer is read when its turn comes.

    Args:
        source: the trained model, with the weights rounded as they were written.
        folder: the export.
        beside: folder on a disk with room for what transformers make of the files; None: ``folder``.

    Returns:
        Largest difference, relative to the largest logit.

    Raises:
        CheckpointError: transformers do not load or run it, or logits differ by more than rounding.
    """
    found = _loaded(folder, torch.float32, beside or folder)
    ids = _token_ids(found.model, folder)
    try:
        with found.running() as model:
            theirs = _logits(model, ids)
    except Exception as error:  # whatever a class runs into
        raise CheckpointError(f"transformers load {folder} but cannot run it: {one_line(error, 500)}") from error
    with trained_by_layer(source).running() as model:
        ours, decided = decided_logits(model, ids)
    return require_close(theirs[decided], ours[decided], "logits")


def _loaded(folder: Path, dtype: torch.dtype, beside: Path) -> ByLayer:
    from transformers import AutoModelForCausalLM

    import mocte_ds.convert.hf.register  # noqa: F401

    own = read_object(folder / "config.json", CheckpointError).get("user_keys")
    # With keys of the user's own it is their copies in the folder that must compute the same.
    source = class_beside(folder) if own else contextlib.nullcontext(AutoModelForCausalLM)
    how = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    how |= {} if own else {"trust_remote_code": False}
    info: dict[str, Any] = {}

    def load() -> Any:
        with source as theirs:
            model, told = theirs.from_pretrained(folder, **how)
        info.update(told)
        return model

    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            found = load_by_layer(folder, load, beside)
    except Exception as error:  # transformers raise many types for what they cannot load
        text = one_line(error, 500)
        raise CheckpointError(f"transformers cannot load {folder}: {text}") from error
    lost = {key: [str(value) for value in values][:3] for key, values in info.items() if values}
    if lost:
        raise CheckpointError(f"transformers could not load everything of {folder}: {lost}.")
    found.model.eval()
    return found


def _token_ids(model: Any, folder: Path) -> Tensor:
    """(B, T) random token ids."""
    rows, length = COMPARED_SHAPE
    length = min(length, longest_context(model.config, folder) or length)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def decided_logits(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a trained model, and where they can be compared with those of another program.

    Args:
        model: with its blocks.
        ids: (B, T) token ids.

    Returns:
        Logits (B, T, V), and (B, T) whether a position and all before it are clear of every gate's boundaries.

    Raises:
        CheckpointError: so few are that a gate leaves the choice to rounding.
    """
    clear = torch.ones(ids.shape, dtype=torch.bool)

    def look(block: Block, inputs: tuple[Tensor, ...]) -> None:
        clear.logical_and_(margins(block, inputs[0].reshape(*ids.shape, -1)) > MARGIN)

    emerged = [m for m in model.modules() if isinstance(m, Block) and m.mode is not BlockMode.WARMUP]
    # After the model's own hook has told the blocks which pass they are in.
    hooks = [block.register_forward_pre_hook(look) for block in emerged]
    try:
        logits = _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    # Attention carries a token's other expert to all later positions.
    decided = clear.long().cummin(dim=1).values.bool()
    if decided.float().mean() < 0.25:
        raise CheckpointError(
            "some gate has experts with the same row, between which rounding decides; such a model cannot be compared. "
            "Rows that training has not told apart yet are the usual reason: take a checkpoint of a later step."
        )
    return logits, decided
