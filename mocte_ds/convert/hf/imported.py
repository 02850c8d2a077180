"""Imports a Hugging Face folder as the start of a run: exact, and checked against transformers."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mocte_ds.base_model import longest_context, make_config
from mocte_ds.checkpoints.source import CheckpointSource, Source
from mocte_ds.checkpoints.weights import Made, Tensors, write_weights
from mocte_ds.config import MocteConfig
from mocte_ds.convert.hf.emerged import Emerged
from mocte_ds.convert.hf.export import peak_bytes
from mocte_ds.convert.hf.imported_folder import read_folder
from mocte_ds.convert.hf.kept_tokenizer import KeptTokenizer
from mocte_ds.convert.hf.load import refusing
from mocte_ds.convert.hf.output_folder import finished_folder, folder_above, require_free, require_room, write_json
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.convert.hf.trained import quiet_transformers
from mocte_ds.convert.hf.trained_check import compare_logits
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe.attach import find_ffns
from mocte_ds.ownership.checksums import Checksums
from mocte_ds.ownership.durable import replace_text

FACTS_FILE, TAG, TOOL = "import.json", "step0", "import_hf"


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

    In memory are a layer with its experts, and what lies outside of the layers, in fp32.

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
    with quiet_transformers(), refusing(folder):
        beside = folder_above(out)
        source = read_folder(folder, beside, max_positions, fixed_router)
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
    config = emergence_config(settings, tokenizer.eod_id, source) if corpus and tokenizer else None
    require_room(out, sum(made.nbytes for made in source.made.values()))
    if sums := Checksums.read(folder):
        shards = Shards(folder)
        sums.require_tensors(list(shards.files), shards.read)
    tell("comparing with transformers")
    with refusing(folder):
        difference = compare_logits(source, folder, beside)
    model, state, weights, emerged = source.model, source.state, Tensors(source.made), None
    if config and corpus and tokenizer:
        longest = longest_context(text, folder) or context
        emerged = Emerged(source, config, tokenizer, corpus, min(context, longest), tell)
        model, state, weights = emerged.model, emerged.state, emerged.tensors(weights)
    with finished_folder(out, TOOL) as pending:
        tell("writing")
        tokens = kept.keep(pending)
        (pending / TAG).mkdir()
        state = {**state, "tokenizer": str(out / tokens.name)}  # where it will lie
        write_weights(pending / TAG, uuid.uuid4().hex, model, weights, state)
        replace_text(pending / "latest", TAG)
        tell("reading what was written")
        _require_same(CheckpointSource(pending / TAG), weights)
        facts: dict[str, Any] = {
            "architecture": source.base["architecture"],
            "parameters": source.parameters,
            "weight_bytes": source.weight_bytes,
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
    settings = settings or {}
    modules = settings["modules"] if "modules" in settings else find_ffns(source.model)
    return MocteConfig.from_dict({"eod_id": eod_id, **settings, "modules": modules, "ep_size": 1})


def _require_same(written: Source, tensors: Tensors) -> None:
    """Refuse a checkpoint that holds other numbers than those that were to be written."""
    for name, tensor in tensors.items():
        wanted = tensor.read() if isinstance(tensor, Made) else tensor
        found = written.read(name)
        if not torch.equal(found, wanted.to(found.dtype)):
            raise CheckpointError(f"the weight {name} was lost or changed on its way through the file.")
