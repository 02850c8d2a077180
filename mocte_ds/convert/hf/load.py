"""A Hugging Face folder as a model: whole, unchanged, of the class that it says, or refused by name."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.base_model import longest_context
from mocte_ds.claims import require_backed, require_blocks
from mocte_ds.convert.hf.by_layer import ByLayer, load_by_layer
from mocte_ds.convert.hf.folder import COMPUTED, require_weights
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.convert.hf.user_keys import require_same
from mocte_ds.errors import CheckpointError, MocteError
from mocte_ds.json_files import read_object, require_small
from mocte_ds.ownership.checksums import Checksums
from mocte_ds.shown import one_line

ONLY_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For transformers' from_pretrained: nothing is fetched, and no code from the folder runs."""
_TIED = 2
"""A tied matrix may stand in a class twice and in the files once."""
_PACKED = 32
"""Quantised weights: bits of a number, at most."""
_BUFFER_BYTES = 1 << 30
_TRIED = 16
"""Tokens that a loaded model is tried on."""


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a causal language model of transformers.

    Args:
        folder: in Hugging Face format; only read, no code in it is run. An export of ours is held against its
            checksums, any other folder against what its own config says.
        dtype: of the weights in memory; None: as they are stored.

    Returns:
        The model on the CPU.

    Raises:
        CheckpointError: files are missing, damaged or changed, the config belongs to other weights, transformers do
            not load it, or it has routing keys of a script other than those that are registered; names the file or the
            tensor.
        ConfigError: no such key is registered.
    """
    return _loaded(folder, lambda: _model(folder, dtype))


def load_folder_by_layer(folder: Path, dtype: torch.dtype, beside: Path) -> ByLayer:
    """:func:`load_model` with weights that stay in their files.

    Args:
        folder: as there.
        dtype: in which the model computes.
        beside: as of :func:`mocte_ds.convert.hf.by_layer.load_by_layer`.

    Raises:
        CheckpointError, ConfigError: as there.
    """

    def finite(name: str, parameter: Tensor) -> None:
        _require_finite(folder, name, parameter)

    def load() -> Any:
        found.append(load_by_layer(folder, lambda: _model(folder, dtype), beside, finite))
        return found[0].model

    found: list[ByLayer] = []
    _loaded(folder, load, lambda _: found[0].running())
    return found[0]


def _loaded(
    folder: Path, load: Callable[[], Any], running: Callable[[Any], AbstractContextManager[Any]] = nullcontext
) -> Any:
    """What ``load`` makes of a folder, checked before and after."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model in Hugging Face format: config.json is missing.")
    require_small(folder, CheckpointError)
    sums = Checksums.read(folder)
    if sums:
        sums.require_files()
    values = read_object(folder / "config.json", CheckpointError, foreign=True)
    require_weights(folder)
    shards = Shards(folder)
    shapes = {name: tuple(shards.outline(name)[1]) for name in shards.files}
    require_backed(values, shapes, folder / "config.json")
    if values.get("model_type") == "mocte_blocks":
        require_blocks(values.get("blocks"), shapes, folder / "config.json")
        require_same(values.get("user_keys"), folder)
    if sums:
        sums.require_tensors(list(shards.files), shards.read)
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    with refusing(folder):
        _require_room(folder, stored * (_PACKED if "quantization_config" in values else _TIED))
        model = load()
    with running(model):
        _require_runs(model, folder)
    return model


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Within it whatever transformers raise for a damaged folder is a CheckpointError; our own errors pass."""
    try:
        yield
    except (MocteError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # they raise many types; tokenizers panic
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def _require_room(folder: Path, most: int) -> None:
    """Refuse a config that asks for more numbers than the files hold, before memory is taken for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import mocte_ds.convert.hf.register  # noqa: F401

    config = AutoConfig.from_pretrained(folder, **ONLY_LOCAL)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in blank.parameters())
    buffers = sum(buffer.nbytes for buffer in blank.buffers())
    if wanted > most or buffers > _BUFFER_BYTES:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of {wanted:,} parameters and {buffers:,} bytes of tables, "
            "more than the folder's files hold: the config belongs to another model, or files are missing."
        )


def _model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    kind: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kind, **ONLY_LOCAL)
    for key, what in (
        ("missing_keys", "has no tensor"),
        ("unexpected_keys", "holds a tensor for which its class has no place:"),
        ("mismatched_keys", "has a tensor of another shape than its config says:"),
        ("error_msgs", "cannot be loaded:"),
    ):
        names = sorted(_names(info.get(key) or ()))
        names = [name for name in names if not COMPUTED.fullmatch(name)]
        if names:
            raise CheckpointError(
                f"{folder} {what} {names[0][:200]} ({len(names)} in all; {type(model).__name__}): its files are "
                "incomplete, or its config belongs to another model."
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            _require_finite(folder, name, parameter)
    return model


def _require_finite(folder: Path, name: str, parameter: Tensor) -> None:
    if not torch.isfinite(parameter).all():
        raise CheckpointError(f"{folder}: {name} holds numbers that are not finite: it is damaged, or diverged.")


@torch.no_grad()
def _require_runs(model: Any, folder: Path) -> None:
    """Refuse a config whose values fit the weights but not each other, which shows in no earlier place."""
    longest = longest_context(model.config, folder / "config.json")
    ids = torch.zeros(1, min(_TRIED, longest or _TRIED), dtype=torch.int64)
    try:
        model(input_ids=ids.to(model.device))
    except Exception as error:  # whatever a class runs into
        raise CheckpointError(
            f"{folder}: transformers load the model but cannot run it, its config is damaged: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error


def _names(found: Iterable[Any]) -> Iterable[str]:
    for item in found:
        yield str(item[0]) if isinstance(item, tuple | list) else str(item)
