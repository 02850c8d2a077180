"""Imports a Hugging Face folder as the start of a run: exact, checked against transformers before it says done."""

import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mocte_ds.base_model import base_facts, changes_context, config_values, longest_context, make_config, require_base
from mocte_ds.checkpoints.names import is_gate
from mocte_ds.checkpoints.source import Source, StoredSource, empty_model
from mocte_ds.checkpoints.weights import Made, Tensors, write_weights
from mocte_ds.claims import require_backed, require_experts, require_layers
from mocte_ds.config import MocteConfig
from mocte_ds.convert.hf.emerged import Emerged
from mocte_ds.convert.hf.export import peak_bytes
from mocte_ds.convert.hf.families import FAMILIES, Mixture
from mocte_ds.convert.hf.families.family import HEAD, LAYER
from mocte_ds.convert.hf.folder import FLOATS, Folder
from mocte_ds.convert.hf.kept_tokenizer import CONFIG_FILE, KeptTokenizer
from mocte_ds.convert.hf.load import ONLY_LOCAL, load_model, refusing
from mocte_ds.convert.hf.output_folder import finished_folder, require_free, require_room, write_json
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.convert.hf.trained import quiet_transformers
from mocte_ds.convert.hf.trained_check import compare_logits
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_object, require_small
from mocte_ds.moe.attach import matching_modules
from mocte_ds.moe.block import BlockMode, ExpertMode
from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.ownership.checksums import Checksums
from mocte_ds.ownership.durable import replace_text
from mocte_ds.shown import one_line

_LAYER_NUMBER = re.compile(r"model\.layers\.(\d{1,9})\.")
FACTS_FILE, TAG, TOOL = "import.json", "step0", "import_hf"


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
        self.made: dict[str, Callable[[], Tensor]] = {}
        """Each tensor as it lies there."""
        self.parameters = self.weight_bytes = 0
        """Of the folder."""
        self._path = path

    def _stored(self, name: str) -> Tensor:
        tensor = self.made[name]()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self._path.parent}: {name} holds numbers that are not finite: it is damaged, or diverged."
            )
        return tensor

    def tensors(self) -> Tensors:
        """All of them, as they are stored."""
        found: Tensors = {}
        for name, shape in self.shapes.items():
            found[name] = Made(self._dtype(name), shape, (), partial(self._stored, name))
        return found


def start_state(config: MocteConfig | None = None, names: list[str] | None = None) -> dict[str, Any]:
    """The blocks of a start, whose experts train from the beginning on.

    Args:
        config: "mocte" block; None: a dense model.
        names: of the blocks.
    """
    experts = config.num_experts * len(config.routers) if config else 0
    modes = {"mode": BlockMode.SPECIALISING.value, "experts": [ExpertMode.TRAINING.value] * experts}
    return {"mocte": config.to_dict() if config else None, "blocks": [{"name": n, **modes} for n in names or ()]}


def read_folder(folder: Path, max_positions: int | None = None, fixed_router: bool = False) -> ImportedSource:
    """A folder as a source; its config is believed only as far as the files bear it out.

    Args:
        folder: in Hugging Face format; only read, no code in it is run.
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
    return _dense(folder, name, max_positions)


def _dense(folder: Path, name: Any, max_positions: int | None) -> ImportedSource:
    """A folder of any other class of transformers."""
    model = load_model(folder, torch.float32)
    if name is not None and name != type(model).__name__:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names the architecture {str(name)[:80]}, and transformers load its model_type as "
            f"a {type(model).__name__}; only causal language models can be imported."
        )
    _shorten(model.config, max_positions, folder)
    base = require_base(base_facts(model), folder / CONFIG_FILE)
    source, shards = ImportedSource(base, start_state(), folder / CONFIG_FILE), Shards(folder)
    kinds = {name: FLOATS[shards.outline(name)[0]] for name in shards.files if shards.outline(name)[0] in FLOATS}
    usual = next(iter(kinds.values())) if len(set(kinds.values())) == 1 else torch.float32
    state = model.state_dict()
    del model
    for name in source.shapes:
        tensor = state.pop(name)
        # As it lies in the files, whatever the config says of the dtype.
        tensor = tensor.to(kinds.get(name, usual)) if tensor.is_floating_point() else tensor
        source.made[name] = partial(_same, tensor)
    numbers = {name: like for name, like in source.model.named_parameters()}
    source.parameters = sum(like.numel() for like in numbers.values())
    source.weight_bytes = sum(source.made[name]().nbytes for name in numbers)
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
    dense = ImportedSource(base, start_state(), path)
    source = ImportedSource(base, start_state(mocte, matching_modules(dense.model, mocte.modules)), path)
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
        wanted = source.shapes[pair.ours[0]] if pair.ours else ()
        if pair.ours and tuple(blank.shape) != wanted:
            raise CheckpointError(
                f"{files.folder}: {pair.theirs} has the shape {tuple(blank.shape)}, which does not fit the config: "
                f"{wanted} is wanted."
            )
        if pair.ours:
            exact = torch.float32 if is_gate(pair.ours[0]) else blank.dtype
            source.made[pair.ours[0]] = partial(_read, files, pair.theirs, exact)
        elif files.read(pair.theirs).any():
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
    # What only training needs: the FFN of which experts would have been born, and what routers are to learn.
    narrow = files.blanks[embedding].dtype
    for ours, like in source.model.state_dict().items():
        if ours not in source.made:
            dtype = narrow if ".dense." in ours else like.dtype
            source.made[ours] = partial(torch.zeros, tuple(like.shape), dtype=dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _read(files: Folder, name: str, dtype: torch.dtype) -> Tensor:
    return files.read(name).to(dtype)


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


def import_hf(
    folder: str | Path,
    out: str | Path,
    max_positions: int | None = None,
    corpus: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    context: int = 256,
    fixed_router: bool = False,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Write a folder that `model.init` of a run file names, and that tools/export_hf.py exports again.

    The model is in memory as a whole, in fp32, to be compared.

    Args:
        folder: a dense model of any architecture of transformers, or a mixture of experts of one of the families
            (docs/huggingface.md), with safetensors and, if it is to be trained on, a tokenizer.json; only read, no code
            in it is run. A mixture keeps its experts and routers.
        out: folder to write; appears as a whole at the end, never half. An earlier import there is replaced.
        max_positions: longest context of the run; None: the folder's.
        corpus: folder of texts that show the model's features, so that experts emerge at once; None: the run begins in
            warm-up.
        settings: "mocte" block of the experts; None: its defaults, in every layer.
        context: tokens of a sequence of the corpus; at most the longest context.
        fixed_router: routers of a mixture do not train on.
        tell: called with a line for each stage.

    Returns:
        Facts: architecture, parameters (of the folder), weight_bytes (in its files), start_bytes and peak_bytes (memory
        of this process at the start, and at most so far), tensors_compared, logit_difference, model (its config); with
        experts mocte (the complete block); with a corpus clusters (found in the documents, by block) and tokens (looked
        at).

    Raises:
        CheckpointError: the folder is incomplete or damaged, or blocks cannot compute what it does; names what.
        DataError: the tokenizer is missing or damaged.
        ConfigError: an ``out`` that holds something else, or a "mocte" block that does not fit.
    """
    folder, start = Path(folder), psutil.Process().memory_info().rss
    out = require_free(Path(out), folder, TOOL)
    tell(f"reading {folder}")
    source: Source
    with quiet_transformers(), refusing(folder):
        source = imported = read_folder(folder, max_positions, fixed_router)
    if source.emerged and corpus:
        raise ConfigError(f"{folder} has experts already; leave the corpus out.")
    kept, text = KeptTokenizer(folder), make_config(source.base, folder).get_text_config()
    kept.require_fit(text.vocab_size)
    tokenizer = kept.tokenizer
    if tokenizer is None:
        tell(f"{folder} has no tokenizer: weights alone are imported, and training needs data with ids that fit them")
    if source.emerged and tokenizer:
        source.state["mocte"]["eod_id"] = tokenizer.eod_id
    if corpus and tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer, and {corpus} holds texts; add one, or leave the corpus out.")
    weights, config = imported.tensors(), None
    if corpus and tokenizer:
        config = emergence_config(settings, tokenizer.eod_id, imported)
    needed = sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in weights.values())
    require_room(out, needed)
    if sums := Checksums.read(folder):
        shards = Shards(folder)
        sums.require_tensors(list(shards.files), shards.read)
    tell("comparing with transformers")
    with refusing(folder):
        difference = compare_logits(source, folder)
    emerged = None
    if config and corpus and tokenizer:
        longest = longest_context(text, folder) or context
        emerged = Emerged(imported, config, tokenizer, corpus, min(context, longest), tell)
        source, weights = emerged.source, emerged.tensors(weights)
    with finished_folder(out, TOOL) as pending:
        tell("writing")
        tokens = kept.keep(pending)
        (pending / TAG).mkdir()
        state = {**source.state, "tokenizer": str(out / tokens.name)}  # where it will lie
        write_weights(pending / TAG, uuid.uuid4().hex, source.model, weights, state)
        replace_text(pending / "latest", TAG)
        tell("reading what was written")
        _require_same(StoredSource(pending / TAG), weights)
        facts: dict[str, Any] = {
            "architecture": source.base["architecture"],
            "parameters": imported.parameters,
            "weight_bytes": imported.weight_bytes,
            "start_bytes": start,
            "peak_bytes": peak_bytes(),
            "tensors_compared": len(weights),
            "logit_difference": difference,
            "model": source.base["config"],
        }
        if state["mocte"]:
            facts["mocte"] = state["mocte"]
        if emerged:
            facts |= {"clusters": emerged.clusters, "tokens": emerged.tokens_seen}
        write_json(pending / FACTS_FILE, facts)
    return facts


def emergence_config(settings: dict[str, Any] | None, eod_id: int, source: Source) -> MocteConfig:
    """The "mocte" block of experts that emerge at once.

    Args:
        settings: as in a run's DeepSpeed config; None: defaults, in every FFN.
        eod_id: ends a document, where the block does not say.
        source: the dense model.
    """
    ffns = [name for name, module in source.model.named_modules() if name and ffn_shape(module) is not None]
    return MocteConfig.from_dict({"modules": ffns, "eod_id": eod_id, **(settings or {}), "ep_size": 1})


def _require_same(written: Source, tensors: Tensors) -> None:
    """Refuse a checkpoint that holds other numbers than those that were to be written."""
    for name, tensor in tensors.items():
        wanted = tensor.read() if isinstance(tensor, Made) else tensor
        found = written.read(name)
        if not torch.equal(found, wanted.to(found.dtype)):
            raise CheckpointError(f"the weight {name} was lost or changed on its way through the file.")
