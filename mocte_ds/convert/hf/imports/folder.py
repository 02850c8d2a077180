"""Imports a Hugging Face folder as the start of a run: exact, checked against transformers before it says done."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mocte_ds.checkpoints.source import Source, StoredSource, empty_decoder
from mocte_ds.checkpoints.weights import Made, Tensors, write_weights
from mocte_ds.config import MocteConfig
from mocte_ds.convert.hf.compare import compare_function
from mocte_ds.convert.hf.dense import Layout, SpecialIds, gpt2, llama, stock_class
from mocte_ds.convert.hf.experts import glm4moe, mixtral, olmoe, qwen2moe
from mocte_ds.convert.hf.export import peak_bytes
from mocte_ds.convert.hf.folder import Folder
from mocte_ds.convert.hf.imports.config import CONFIG_FILE, read_folder
from mocte_ds.convert.hf.imports.emerge import Emerged
from mocte_ds.convert.hf.imports.experts import plan_mixture
from mocte_ds.convert.hf.imports.keys import Foreign
from mocte_ds.convert.hf.imports.state import start_state
from mocte_ds.convert.hf.imports.weights import Plan, plan_dense
from mocte_ds.convert.hf.kept_tokenizer import KeptTokenizer
from mocte_ds.convert.hf.pieces import Pieces
from mocte_ds.convert.hf.whole import require_free, require_room, whole, write_json
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe.attach import matching_modules
from mocte_ds.ownership.durable import replace_text
from mocte_ds.shown import one_line

FACTS_FILE, TAG, _TOOL = "import.json", "step0", "import_hf"
_LAYOUTS: dict[str, Callable[[Source, SpecialIds], Layout]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "Qwen3ForCausalLM": llama,
    "GPT2LMHeadModel": gpt2,
    "MixtralForCausalLM": mixtral,
    "OlmoeForCausalLM": olmoe,
    "Qwen2MoeForCausalLM": qwen2moe,
    "Glm4MoeForCausalLM": glm4moe,
}


class FolderSource(Source):
    """The weights of a folder as a decoder of ours has them."""

    def __init__(self, folder: Folder, foreign: Foreign) -> None:
        """Read everything but the weights, and check that each of them is there.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape.
        """
        path, sizes = folder.folder / CONFIG_FILE, asdict(foreign.decoder)
        state = start_state(foreign.decoder)
        try:
            model = empty_decoder(sizes, None, path)
            if foreign.mocte:
                config = MocteConfig.from_dict(foreign.mocte)
                state = start_state(foreign.decoder, config, matching_modules(model, config.modules))
                model = empty_decoder(sizes, {"config": state["mocte"], "blocks": state["blocks"]}, path)
        except (RuntimeError, OverflowError, ConfigError) as error:
            raise CheckpointError(f"{path} has sizes of which no model can be built: {one_line(error)}") from error
        super().__init__(model, state)
        self.folder, self.foreign = folder, foreign
        self.plan: Plan = plan_mixture(folder, foreign, model) if foreign.mocte else plan_dense(folder, model)

    def _stored(self, name: str) -> Tensor:
        return self.plan[name].tensor(self.folder)

    def layout(self) -> Layout:
        """The folder's class, as it would be written."""
        name = self.foreign.architecture
        layout = _LAYOUTS[name](self, SpecialIds(None, None, None))
        return replace(layout, name=name, model_class=stock_class(name))


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

    Weights are read, written and compared one tensor or one layer at a time: the model may be larger than memory.

    Args:
        folder: a dense model or a mixture of experts in Hugging Face format (docs/huggingface.md), with safetensors
            and, if it is to be trained on, a tokenizer.json; only read, no code in it is run. A mixture keeps its
            experts and routers.
        out: folder to write; appears as a whole at the end, never half. An earlier import there is replaced.
        max_positions: longest context of the run; None: the folder's.
        corpus: folder of texts that show the model's features, so that experts emerge at once; None: the run begins in
            warm-up.
        settings: "mocte" block of the experts; None: its defaults, in every layer.
        context: tokens of a sequence of the corpus; at most max_positions.
        fixed_router: routers of a mixture do not train on.
        tell: called with a line for each stage.

    Returns:
        Facts: architecture, parameters (of the folder), weight_bytes (in its files), start_bytes and peak_bytes (memory
        of this process at the start, and at most so far), tensors_compared, logit_difference, model (sizes); with
        experts mocte (the complete block); with a corpus clusters (found in the documents, by block) and tokens (looked
        at).

    Raises:
        CheckpointError: the folder is incomplete or damaged, or our decoders cannot compute what it does; names what.
        DataError: the tokenizer is missing or damaged.
        ConfigError: an ``out`` that holds something else, or a "mocte" block that does not fit.
    """
    folder, start = Path(folder), psutil.Process().memory_info().rss
    out = require_free(Path(out), folder, _TOOL)
    tell(f"reading {folder}")
    foreign, files = read_folder(folder, max_positions, fixed_router)
    if foreign.mocte and corpus:
        raise ConfigError(f"{folder} has experts already; leave the corpus out.")
    source = FolderSource(files, foreign)
    kept = KeptTokenizer(folder)
    kept.require_fit(foreign.decoder.vocab_size)
    tokenizer = kept.tokenizer
    if tokenizer is None:
        tell(f"{folder} has no tokenizer: weights alone are imported, and training needs data with ids that fit them")
    if foreign.mocte and tokenizer:
        source.state["mocte"]["eod_id"] = tokenizer.eod_id
    if corpus and tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer, and {corpus} holds texts; add one, or leave the corpus out.")
    config = emergence_config(settings, tokenizer.eod_id) if corpus and tokenizer else None
    require_room(out, sum(taken.nbytes for taken in source.folder.blanks.values()))
    source.folder.require_checksums()
    tell("comparing our decoder with transformers")
    compared = compare_function(source, source.layout(), Pieces(folder, source.layout(), source.folder))
    emerged = None
    if config and corpus and tokenizer:
        emerged = Emerged(source, config, tokenizer, corpus, min(context, foreign.decoder.max_positions), tell)
    with whole(out, _TOOL) as pending:
        tell("writing")
        tokens = kept.keep(pending)
        tensors: Tensors = {
            name: Made(taken.dtype, taken.shape, (), partial(taken.tensor, source.folder))
            for name, taken in source.plan.items()
        }
        model, state = source.model, source.state
        if emerged:
            model, state, tensors = emerged.model, emerged.state, emerged.tensors(tensors)
        (pending / TAG).mkdir()
        state = {**state, "tokenizer": str(out / tokens.name)}  # where it will lie
        write_weights(pending / TAG, uuid.uuid4().hex, model, tensors, state)
        replace_text(pending / "latest", TAG)
        tell("reading what was written")
        _require_same(StoredSource(pending / TAG), tensors)
        facts: dict[str, Any] = {
            "architecture": foreign.architecture,
            "parameters": sum(torch.Size(t.shape).numel() for t in source.plan.values() if t.sources),
            "weight_bytes": sum(taken.nbytes for taken in source.folder.blanks.values()),
            "start_bytes": start,
            "peak_bytes": peak_bytes(),
            "tensors_compared": len(tensors),
            "logit_difference": compared["logit_difference"],
            "model": asdict(foreign.decoder),
        }
        if state["mocte"]:
            facts["mocte"] = state["mocte"]
        if emerged:
            facts |= {"clusters": emerged.clusters, "tokens": emerged.tokens}
        write_json(pending / FACTS_FILE, facts)
    return facts


def emergence_config(settings: dict[str, Any] | None, eod_id: int) -> MocteConfig:
    """The "mocte" block of experts that emerge at once.

    Args:
        settings: as in a run's DeepSpeed config; None: defaults, in every layer.
        eod_id: ends a document, where the block does not say.
    """
    block = {"modules": "model.layers.*.mlp", "eod_id": eod_id, **(settings or {})}
    return MocteConfig.from_dict({**block, "ep_size": 1})


def _require_same(written: Source, tensors: Tensors) -> None:
    """Refuse a checkpoint that holds other numbers than those that were to be written."""
    for name, tensor in tensors.items():
        wanted = tensor.read() if isinstance(tensor, Made) else tensor
        found = written.read(name)
        if not torch.equal(found, wanted.to(found.dtype)):
            raise CheckpointError(f"the weight {name} was lost or changed on its way through the file.")
