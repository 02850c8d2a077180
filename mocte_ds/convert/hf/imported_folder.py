"""A folder in Hugging Face format as the source of a start, if its files bear out what its config says."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.base_model import base_facts, changes_context, config_values, longest_context, require_base
from mocte_ds.checkpoints.names import is_gate
from mocte_ds.checkpoints.source import Source, empty_model
from mocte_ds.checkpoints.weights import Made
from mocte_ds.claims import require_backed, require_experts, require_layers
from mocte_ds.config import MocteConfig
from mocte_ds.convert.hf.by_layer import ByLayer, same_as_stored
from mocte_ds.convert.hf.families import FAMILIES, Mixture
from mocte_ds.convert.hf.families.tensors import HEAD, LAYER
from mocte_ds.convert.hf.folder import FLOATS, Folder
from mocte_ds.convert.hf.kept_tokenizer import CONFIG_FILE
from mocte_ds.convert.hf.load import ONLY_LOCAL, load_folder_by_layer, refusing
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_object, require_small
from mocte_ds.moe.block import BlockMode, ExpertMode, running_state
from mocte_ds.ownership.checksums import Checksums
from mocte_ds.shown import one_line

_LAYER_NUMBER = re.compile(r"model\.layers\.(\d{1,9})\.")


class ImportedSource(Source):
    """The weights of a folder, under the names of a model with blocks."""

    def __init__(self, base: dict[str, Any], state: dict[str, Any], path: Path) -> None:
        """No weights yet; :attr:`made` gets them.

        Args:
            base: as of :func:`mocte_ds.base_model.base_facts`.
            state: "mocte" and "blocks".
            path: of the config, for messages.

        Raises:
            CheckpointError: no model can be made of it.
        """
        mocte = {"config": state["mocte"], "blocks": state["blocks"]} if state["mocte"] else None
        try:
            model = empty_model(base, mocte, path)
        except (RuntimeError, OverflowError, ConfigError) as error:
            raise CheckpointError(f"{path} has sizes of which no model can be built: {one_line(error)}") from error
        super().__init__(model, {"step": 0, "tokens": 0, "tokenizer": None, "base": base, **state})
        self.made: dict[str, Made] = {}
        """Each tensor as it is stored."""
        self.parameters = self.weight_bytes = 0
        """Of the folder."""

    def take(self, name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> None:
        """Say what makes a tensor.

        Args:
            name: of it.
            dtype: that it has.
            make: makes it when it is asked for.
        """
        self.made[name] = Made(dtype, self.shapes[name], (), make)

    def _stored(self, name: str) -> Tensor:
        return self.made[name].read()

    def _dtype(self, name: str) -> torch.dtype:
        return self.made[name].dtype


def start_state(config: MocteConfig | None = None, names: list[str] | None = None) -> dict[str, Any]:
    """The blocks of a start, whose experts train from the beginning on.

    Args:
        config: "mocte" block; None: a dense model.
        names: of the blocks.
    """
    experts = config.num_experts * len(config.routers) if config else 0
    modes = {"mode": BlockMode.SPECIALISING.value, "experts": [ExpertMode.TRAINING.value] * experts}
    return {"mocte": config.to_dict() if config else None, "blocks": [{"name": n, **modes} for n in names or ()]}


def read_folder(
    folder: Path, beside: Path, max_positions: int | None = None, fixed_router: bool = False
) -> ImportedSource:
    """A folder as a source; its config is believed only as far as the files bear it out.

    Args:
        folder: in Hugging Face format; only read, no code in it is run.
        beside: folder on a disk with room for what transformers make of other tensors than they find.
        max_positions: shorter context than the folder's; None: the folder's.
        fixed_router: routers of experts do not train on.

    Raises:
        CheckpointError: no config, an architecture that is not supported, values that blocks do not compute or the
            files do not bear out, or files that are missing or damaged; names which and what to do.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: {folder} is not a model in Hugging Face format.")
    require_small(folder, CheckpointError)
    if sums := Checksums.read(folder):
        sums.require_files()
    values = read_object(path, CheckpointError, foreign=True)
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if values.get("model_type") in ("mocte", "mocte_blocks"):
        raise CheckpointError(f"{folder} is an export with experts; start from the checkpoints of its run instead.")
    if values.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config: take the folder without quantisation.")
    if isinstance(name, str) and name in FAMILIES:
        return _mixture(folder, name, values, max_positions, fixed_router)
    return _dense(folder, name, max_positions, beside)


def _dense(folder: Path, name: Any, max_positions: int | None, beside: Path) -> ImportedSource:
    """A folder of any other class of transformers."""
    usual = _usual_dtype(folder)
    loaded = load_folder_by_layer(folder, usual, beside)
    model = loaded.model
    if name is not None and name != type(model).__name__:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names the architecture {str(name)[:80]}, and transformers load its model_type as "
            f"a {type(model).__name__}; only causal language models can be imported."
        )
    _shorten(model.config, max_positions, folder)
    base = require_base(base_facts(model), folder / CONFIG_FILE)
    source, shards = ImportedSource(base, start_state(), folder / CONFIG_FILE), Shards(folder)
    state = model.state_dict(keep_vars=True)
    for name in source.shapes:
        tensor = state[name]
        if name in shards.files and same_as_stored(stored := shards.read(name), loaded.value(tensor)):
            # As it lies in the files, whatever the config says of the dtype.
            source.take(name, stored.dtype, partial(shards.read, name))
        else:
            dtype = usual if tensor.is_floating_point() else tensor.dtype
            source.take(name, dtype, partial(_value, loaded, tensor, dtype))
    numbers = [source.made[name] for name, _ in source.model.named_parameters()]  # tied ones once
    source.parameters = sum(made.numel for made in numbers)
    source.weight_bytes = sum(made.nbytes for made in numbers)
    return source


def _mixture(
    folder: Path, name: str, values: dict[str, Any], max_positions: int | None, fixed_router: bool
) -> ImportedSource:
    """A folder of one of the families; its experts become those of blocks."""
    path, family = folder / CONFIG_FILE, FAMILIES[name]
    files = Folder(folder, name)
    require_backed(values, {name: tuple(blank.shape) for name, blank in files.blanks.items()}, path)
    count = _count(values, path)
    require_layers(count, _known(files, name, count), "model.layers", path)
    config = _config(folder)
    try:
        start = family.config_from(config.get_text_config(), fixed_router)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path} has values that no {name} has: {one_line(error, 600)}") from error
    require_experts(start.mocte["num_experts"], len(start.widths), files.files, path)
    _shorten(config, max_positions, folder)
    generation = _generation(folder)
    base = {"architecture": name, "model_type": config.model_type, "config": config_values(config, f"{path}")}
    widths = {f"{LAYER.format(layer=layer)}mlp": width for layer, width in start.widths.items()}
    base |= {"generation": generation, "dense_ffns": widths}
    try:
        mocte = MocteConfig.from_dict(start.mocte)
    except ConfigError as error:
        raise CheckpointError(f"{path} has experts that no run has: {one_line(error, 600)}") from error
    source = ImportedSource(base, start_state(mocte, list(widths)), path)
    _take(source, files, name)
    source.parameters = sum(blank.numel() for blank in files.blanks.values())
    source.weight_bytes = sum(blank.nbytes for blank in files.blanks.values())
    return source


def _take(source: ImportedSource, files: Folder, name: str) -> None:
    """Say where every tensor comes from; what is missing, left over or of another shape is refused.

    Raises:
        CheckpointError: names it.
    """
    run, family, left = Mixture(source), FAMILIES[name], dict(files.files)
    pairs = family.pairs(run)
    for pair in pairs:
        blank = files.blanks.get(pair.theirs)
        if blank is None and pair.buffer:
            continue  # zeros, in folders of classes that have learned to correct their choice
        if blank is None:
            raise CheckpointError(f"{files.folder} has no tensor {pair.theirs}, which its config asks for.")
        left.pop(pair.theirs)
        if pair.ours:
            wanted = source.shapes[pair.ours[0]]
            if tuple(blank.shape) != wanted:
                raise CheckpointError(
                    f"{files.folder}: {pair.theirs} has the shape {tuple(blank.shape)}, which does not fit the config: "
                    f"{wanted} is wanted."
                )
            ours = pair.ours[0]
            dtype = torch.float32 if is_gate(ours) else blank.dtype
            source.take(ours, dtype, partial(_read, files, pair.theirs, ours, dtype))
        elif (found := files.read(pair.theirs)).any() and not torch.equal(found.float(), pair.make()):
            raise CheckpointError(
                f"{files.folder}: {pair.theirs} belongs to a shared expert that our blocks do not have; only one of "
                "zeros can be left out."
            )
    embedding = "model.embed_tokens.weight"
    if HEAD in source.shapes and HEAD not in source.made:
        source.made[HEAD] = source.made[embedding]
        if left.pop(HEAD, None) and not torch.equal(files.read(HEAD), files.read(embedding)):
            raise CheckpointError(
                f"{files.folder} has an output matrix {HEAD} of its own, but tie_word_embeddings is true in its "
                "config; set it to false in a copy of the folder, if the model was trained so."
            )
    left = {key: file for key, file in left.items() if key in _known(files, name, run.count)}
    if left:
        raise CheckpointError(f"{files.folder} has the tensor {min(left)}, which its architecture lacks.")
    # What only training needs: what routers are to learn.
    for ours, like in running_state(source.model).items():
        if ours not in source.made:
            source.take(ours, like.dtype, partial(torch.zeros, tuple(like.shape), dtype=like.dtype))


def _usual_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in a folder's files; fp32 where they differ, which holds all of them."""
    shards = Shards(folder)
    kinds = {FLOATS[kind] for kind in (shards.outline(name)[0] for name in shards.files) if kind in FLOATS}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _value(loaded: ByLayer, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return loaded.value(tensor).detach().to(dtype)


def _read(files: Folder, theirs: str, ours: str, dtype: torch.dtype) -> Tensor:
    tensor = files.read(theirs)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{files.folder}: {ours} holds numbers that are not finite: it is damaged, or diverged.")
    return tensor.to(dtype)


def _known(files: Folder, name: str, layers: int) -> dict[str, str]:
    """The tensors of a folder, without layers after the last one that its class leaves unread (for further tokens)."""
    import transformers

    class_ = getattr(transformers, name)
    unread = [re.compile(pattern) for pattern in getattr(class_, "_keys_to_ignore_on_load_unexpected", None) or ()]

    def is_after(key: str) -> bool:
        found = _LAYER_NUMBER.match(key)
        return found is not None and int(found[1]) >= layers and any(pattern.search(key) for pattern in unread)

    return {key: file for key, file in files.files.items() if not is_after(key)}


def _count(values: dict[str, Any], path: Path) -> int:
    count = values.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{path}: num_hidden_layers = {count!r:.80} must be 1 or more.")
    return count


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **ONLY_LOCAL)
    except Exception as error:  # transformers raise many types for a config that they do not know
        raise CheckpointError(f"transformers cannot read {folder / CONFIG_FILE}: {one_line(error)}") from error


def _generation(folder: Path) -> dict[str, Any] | None:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    with refusing(folder):
        return config_values(GenerationConfig.from_pretrained(folder, local_files_only=True), "generation_config.json")


def _shorten(config: Any, positions: int | None, folder: Path) -> None:
    """Give a config a shorter context, where positions are computed and not learned.

    Raises:
        CheckpointError: a longer one, or positions are learned.
    """
    text = config.get_text_config()
    most = longest_context(text, folder / CONFIG_FILE)
    if positions is None or positions == most:
        return
    if not changes_context(config) or most is None:
        raise CheckpointError(
            f"max_positions = {positions}: the positions of {folder} are learned, or stretched by a rule that asks for "
            "the longest context; leave it out."
        )
    if not 1 <= positions <= most:
        raise CheckpointError(f"max_positions = {positions} must lie between 1 and the folder's {most}.")
    text.max_position_embeddings = positions
