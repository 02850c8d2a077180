"""Writes and reads megatron-core's distributed checkpoints; nothing in one is executed."""

import enum
import io
import pickle
import pickletools
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from mocte_ds.errors import CheckpointError
from mocte_ds.shown import one_line

METADATA_FILE = ".metadata"
_WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.")
_NORM, _ROUTER = "pre_mlp_layernorm.weight", "mlp.router.weight"
_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "uint8",
    "bool",
)
_CLASSES = {
    "torch": ("Size", *_DTYPES),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "collections": ("OrderedDict",),
}


def save(model: nn.Module, folder: Path, step: int) -> None:
    """Write a model into an empty folder, for models with and without Transformer Engine.

    To be called within the groups of megatron-core.

    Raises:
        OSError: a file cannot be written.
    """
    from megatron.core import dist_checkpointing

    weights = model.sharded_state_dict()
    norms = {
        name: replace(value, key=_with_engine(value.key))
        for name, value in weights.items()
        if name.endswith(_NORM) and name.replace(_NORM, _ROUTER) in weights
    }
    state = {"model": weights, "norms": norms, "iteration": step, "checkpoint_version": 3.0}
    try:
        dist_checkpointing.save(state, str(folder))
    except CheckpointException as error:
        failure, free = next(iter(error.failures.values()))[0], shutil.disk_usage(folder).free
        # A full disk shows in many ways.
        raise OSError(f"{failure} ({free / 1e6:.0f} MB are free there)") from error


def read(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """This rank's weights of a model from a folder, in the model's dtypes (within the groups of megatron-core).

    Args:
        model: GPTModel, not to be used any more: some of its weights are overwritten.
        folder: written by us or by a training; only read.

    Returns:
        Tensors by their name in the model's state dict.

    Raises:
        CheckpointError: the folder is none, incomplete, damaged, of another model, or holds code.
    """
    _require_plain(folder)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    try:
        content = dist_checkpointing.load_content_metadata(str(folder))
        wanted = model.sharded_state_dict(metadata=content)
        # Objects are pickles, and those of a GPTModel without Transformer Engine are empty.
        tensors = {name: value for name, value in wanted.items() if not isinstance(value, ShardedObject)}
        there = dist_checkpointing.load_tensors_metadata(str(folder))
        for name, value in tensors.items():
            if value.key not in there and _with_engine(value.key) in there:
                tensors[name] = replace(value, key=_with_engine(value.key))
        _require_known(there, {value.key for value in tensors.values()}, folder)
        rows = there["embedding.word_embeddings.weight"].global_shape[0]
        found = dist_checkpointing.load({"model": tensors}, str(folder))["model"]
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # torch and megatron-core raise many types
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    # megatron-core leaves the rows that a shorter matrix does not have as they are.
    if rows < model.vocab_size:
        raise CheckpointError(f"{folder} has {rows} tokens in its vocabulary, the run {model.vocab_size}.")
    return found


def _require_known(there: Iterable[str], wanted: set[str], folder: Path) -> None:
    """Refuse weights that the model has no place for, such as layers too many; states of an optimizer are none."""
    known = wanted | {_with_engine(key) for key in wanted}
    if extra := sorted(key for key in there if key.startswith(_WEIGHTS) and key not in known):
        raise CheckpointError(
            f"{folder} holds {extra[0]}, for which the run's model has no place ({len(extra)} such tensors); name the "
            "settings of the model that was trained."
        )


def _with_engine(key: str) -> str:
    """How models with Transformer Engine name the norm before experts; those without name it as in dense layers."""
    return key.replace("mlp.linear_fc1.layer_norm_weight", _NORM)


def _require_plain(folder: Path) -> None:
    """Refuse a folder whose list of tensors, a pickle, holds anything else than such a list.

    Raises:
        CheckpointError: it does, or it is missing or damaged.
    """
    path = folder / METADATA_FILE
    try:
        content = path.read_bytes()
        _require_bounded(content)
        TensorLists(io.BytesIO(content)).load()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is not a distributed checkpoint of megatron-core."
        ) from error
    except Exception as error:  # pickle raises many types for a damaged file
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _require_bounded(content: bytes) -> None:
    """Refuse a pickle that claims more than its own bytes bear out: memory is taken for the number of a memo."""
    for code, value, _ in pickletools.genops(content):
        if code.name.endswith("PUT") and int(value or 0) > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {value}, and has {len(content)} bytes")


class TensorLists(pickle.Unpickler):
    """Knows the classes of a list of tensors, and no functions."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # Python 3.11.0 to 3.11.3 write a member of an enum as getattr(class, name)
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no list of tensors needs")
        return super().find_class(module, name)


def _member(owner: Any, name: Any) -> enum.Enum:
    """A member of an enum; of anything else no attribute is read."""
    if not (isinstance(owner, enum.EnumMeta) and isinstance(name, str) and name in owner.__members__):
        raise pickle.UnpicklingError("it reads an attribute, which no list of tensors needs")
    return owner.__members__[name]
