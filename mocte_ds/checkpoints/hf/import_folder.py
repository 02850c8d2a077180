"""Imports a Hugging Face folder as the start of a run: exact, checked against transformers before it says done."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mocte_ds.checkpoints.hf.compare import compare_function
from mocte_ds.checkpoints.hf.dense import Layout, SpecialIds, gpt2, llama, stock_class
from mocte_ds.checkpoints.hf.export import peak_bytes
from mocte_ds.checkpoints.hf.folder import Folder
from mocte_ds.checkpoints.hf.import_config import CONFIG_FILE, Foreign, read_config
from mocte_ds.checkpoints.hf.import_emerge import Emerged
from mocte_ds.checkpoints.hf.import_weights import Plan, plan_dense
from mocte_ds.checkpoints.hf.import_write import TAG, Made, made, write_start
from mocte_ds.checkpoints.hf.kept_tokenizer import KeptTokenizer
from mocte_ds.checkpoints.hf.pieces import Pieces
from mocte_ds.checkpoints.hf.whole import require_free, whole, write_json
from mocte_ds.checkpoints.outline import Stored
from mocte_ds.checkpoints.source import Source, StoredSource, empty_decoder
from mocte_ds.config import MocteConfig
from mocte_ds.data.hf_tokenizer import HFTokenizer
from mocte_ds.data.stored_tokenizer import keep_tokenizer, tokenizer_in
from mocte_ds.errors import CheckpointError

FACTS_FILE = "import.json"
_LAYOUTS: dict[str, Callable[[Source, SpecialIds], Layout]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "GPT2LMHeadModel": gpt2,
}


class FolderSource(Source):
    """The weights of a folder as a decoder of ours has them."""

    def __init__(self, folder: Folder, foreign: Foreign) -> None:
        """Read everything but the weights, and check that each of them is there.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape.
        """
        model = empty_decoder(asdict(foreign.decoder), None, folder.folder / CONFIG_FILE)
        super().__init__(model, {"mocte": None})
        self.folder, self.foreign = folder, foreign
        self.mocte: dict[str, Any] | None = None
        """What a checkpoint says of its blocks."""
        self.plan: Plan = plan_dense(folder, model)

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
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Write a folder that `model.init` of a run file names, and that tools/export_hf.py exports again.

    Weights are read, written and compared one tensor or one layer at a time: the model may be larger than memory.

    Args:
        folder: Llama, Mistral, Qwen2 or GPT-2 in Hugging Face format, with safetensors and a tokenizer.json; only
            read, no code in it is run.
        out: folder to write; appears as a whole at the end, never half. An earlier import there is replaced.
        max_positions: longest context of the run; None: the folder's.
        corpus: folder of texts that show the model's features, so that experts emerge at once; None: the run begins in
            warm-up.
        settings: "mocte" block of the experts; None: its defaults, in every layer.
        context: tokens of a sequence of the corpus; at most max_positions.
        tell: called with a line for each stage.

    Returns:
        Facts: architecture, parameters, weight_bytes (in the folder's files), start_bytes and peak_bytes (memory of
        this process at the start, and at most so far), tensors_compared, logit_difference, model (sizes); and with a
        corpus mocte (its complete block), clusters (found in the documents, by block) and tokens (looked at).

    Raises:
        CheckpointError: the folder is incomplete or damaged, or our decoders cannot compute what it does; names what.
        DataError: the tokenizer is missing or damaged.
        ConfigError: an ``out`` that holds something else, or a "mocte" block that does not fit.
    """
    folder, start = Path(folder), psutil.Process().memory_info().rss
    out = require_free(Path(out), folder, FACTS_FILE)
    tell(f"reading {folder}")
    foreign = read_config(folder, max_positions)
    source = FolderSource(Folder(folder, foreign.architecture), foreign)
    KeptTokenizer(folder).require_fit(foreign.decoder.vocab_size)
    tokenizer = HFTokenizer(folder)
    config = emergence_config(settings, tokenizer.eod_id) if corpus else None
    tell("comparing our decoder with transformers")
    compared = compare_function(source, source.layout(), Pieces(folder, source.layout(), source.folder))
    emerged = None
    if config and corpus:
        emerged = Emerged(source, config, tokenizer, corpus, min(context, foreign.decoder.max_positions), tell)
    with whole(out) as pending:
        tell("writing")
        keep_tokenizer(tokenizer, pending)
        tensors: dict[str, Stored | Tensor] = {
            name: made(torch.empty(taken.shape, dtype=taken.dtype, device="meta"), partial(taken.tensor, source.folder))
            for name, taken in source.plan.items()
        }
        model, mocte = source.model, source.mocte
        if emerged:
            model, mocte, tensors = emerged.model, emerged.mocte, emerged.tensors(tensors)
        write_start(pending, model, tensors, mocte, tokenizer_in(out))
        tell("reading what was written")
        _require_same(StoredSource(pending / TAG), tensors)
        facts: dict[str, Any] = {
            "architecture": foreign.architecture,
            "parameters": foreign.decoder.num_params(),
            "weight_bytes": sum(taken.nbytes for taken in source.folder.blanks.values()),
            "start_bytes": start,
            "peak_bytes": peak_bytes(),
            "tensors_compared": len(tensors),
            "logit_difference": compared["logit_difference"],
            "model": asdict(foreign.decoder),
        }
        if mocte:
            facts["mocte"] = mocte["config"]
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


def _require_same(written: Source, tensors: dict[str, Stored | Tensor]) -> None:
    """Refuse a checkpoint that holds other numbers than those that were to be written."""
    for name, tensor in tensors.items():
        wanted = tensor.make() if isinstance(tensor, Made) else tensor.read() if isinstance(tensor, Stored) else tensor
        found = written.read(name)
        if not torch.equal(found, wanted.to(found.dtype)):
            raise CheckpointError(f"the weight {name} was lost or changed on its way through the file.")
