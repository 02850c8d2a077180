"""Exports a checkpoint to Hugging Face format: exact, checked against the trained model before it says done."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mocte_ds import remote_code
from mocte_ds.base_model import make_config
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.source import NARROW, Source, StoredSource
from mocte_ds.convert.hf.as_decoder import DecoderView
from mocte_ds.convert.hf.card import model_card
from mocte_ds.convert.hf.compare import compare
from mocte_ds.convert.hf.dense import Layout, SpecialIds
from mocte_ds.convert.hf.kept_tokenizer import KeptTokenizer, run_tokenizer
from mocte_ds.convert.hf.layouts import CHOICES, choose_layout, stock_layout
from mocte_ds.convert.hf.shards import SHARD_BYTES, Entry, write_shards
from mocte_ds.convert.hf.tokenizer import SourceTokenizer
from mocte_ds.convert.hf.trained import choose_target, emerged_blocks, save_model, tensor_of
from mocte_ds.convert.hf.trained_check import compare_folder, compare_logits
from mocte_ds.convert.hf.whole import require_free, require_room, whole, write_json
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership.checksums import write_checksums

REMOTE_CODE = Path(remote_code.__file__).parent
TOOL = "export_hf"
"""Named by the markers of exports."""
_FACTS_FILE = "export.json"
_NO_LIMIT = 1 << 30
"""Longest context of a model whose config has none."""


def export(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str | None = None,
    tokenizer_path: str | Path | None = None,
    tell: Callable[[str], None] = lambda _text: None,
    choice: str = "auto",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load.

    Weights are read, written and compared one tensor or one layer at a time: the model may be larger than memory.

    Args:
        checkpoint: folder of checkpoints or of one tag; only read.
        out: folder to write; appears as a whole at the end, never half. An earlier export there is replaced.
        dtype: `fp32`, `bf16` or `fp16` weights; gates that were trained are stored in fp32 always. Computing in bf16
            sends the few tokens near a boundary to another expert; loaded with dtype=torch.float32, either export
            routes as the trained model. None: fp32, but for an import without any training and the model of another
            script, which are stored as they are.
        tokenizer_path: sentencepiece model, or a folder with a tokenizer.json; None: the one of the run of
            launch/pretrain.py; the model of another script gets none.
        tell: called with a line for each stage.
        choice: `stock`, `own` or `auto`: see :func:`mocte_ds.convert.hf.layouts.choose_layout`.
        shard_bytes: largest file of weights.

    Returns:
        Facts: architecture, reason (why it is no stock class), parameters, dtype, checkpoint_bytes (files with
        weights), start_bytes and peak_bytes (memory of this process at the start, and at most so far), and what was
        compared (see mocte_ds.convert.hf.compare).

    Raises:
        CheckpointError: the checkpoint is none, damaged, or fits no class (says what to change); the written model
            differs; the folder cannot be written.
        ConfigError: an unknown dtype or choice, or an ``out`` that holds anything but an earlier export, unchanged.
    """
    if dtype not in (None, "fp32", *NARROW):
        raise ConfigError(f"dtype = {dtype!r} is not one of {['fp32', *NARROW]}.")
    start = psutil.Process().memory_info().rss
    folder = find_tag(checkpoint)
    out = require_free(Path(out), folder, TOOL)
    tell(f"reading {folder}")
    source = StoredSource(folder, dtype or "fp32")
    if source.base is not None:
        sizes = {"checkpoint_bytes": source.checkpoint_bytes, "start_bytes": start}
        trained, tokenizer = source.state["tokenizer"], None
        if tokenizer_path is not None or trained is not None:
            tokenizer = run_tokenizer(tokenizer_path, trained, folder)
        kept = dtype or ("fp32" if source.of_a_run else None)
        return export_trained(source, out, kept, tokenizer, tell, choice, shard_bytes, sizes)
    source.dtype = dtype or source.kept_dtype
    tokenizer = run_tokenizer(tokenizer_path, source.state["tokenizer"], folder)
    tokenizer.require_fit(source.config.vocab_size)
    layout = choose_layout(source, tokenizer.special, choice)
    sizes = {"checkpoint_bytes": source.checkpoint_bytes, "start_bytes": start}
    return _export_layout(source, layout, out, tokenizer, tell, shard_bytes, sizes)


def export_trained(
    source: Source,
    out: str | Path,
    dtype: str | None = None,
    tokenizer: SourceTokenizer | KeptTokenizer | None = None,
    tell: Callable[[str], None] = lambda _text: None,
    choice: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    told: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the folder of a user's own model, of any architecture of transformers; it is in memory as a whole.

    Args:
        source: of a user's own model, from a checkpoint or from a run that goes on.
        out: folder to write, from :func:`require_free`.
        dtype: as of :func:`export`; None: as it trains.
        tokenizer: goes along, and gives the ids of special tokens that the model does not name; None: none does.
        tell: as of :func:`export`.
        choice: `stock`: the base model's class, or where experts have emerged a stock one with experts, or none;
            `own`: ours around the base model; `auto`: a stock one where it fits.
        shard_bytes: as of :func:`export`.
        told: further facts.

    Returns:
        Facts, as of :func:`export`.

    Raises:
        CheckpointError: as of :func:`export`.
        ConfigError: an unknown dtype or choice.
    """
    if dtype not in (None, "fp32", *NARROW) or choice not in CHOICES:
        raise ConfigError(
            f"dtype = {dtype!r}, class = {choice!r}: not one of {['fp32', *NARROW]} and of {list(CHOICES)}."
        )
    source.dtype, out = dtype or source.stored_dtype(), Path(out)
    config = make_config(source.base or {}, out).get_text_config()
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    if tokenizer is not None:
        tokenizer.require_fit(config.vocab_size)
        ids = {name: getattr(tokenizer.special, name) if value is None else value for name, value in ids.items()}
    reason, told = None, {**(told or {}), "tokenizer": tokenizer is not None}
    if choice != "own" and emerged_blocks(source):
        try:
            view = DecoderView(source)
            layout = stock_layout(view, SpecialIds(**ids))
        except CheckpointError as error:
            if choice == "stock":
                raise
            choice, reason = "own", str(error)
        else:
            return _export_layout(view, layout, out, tokenizer, tell, shard_bytes, told, source)
    target = replace(choose_target(source, choice), special=SpecialIds(**ids), reason=reason)
    require_room(out, sum(tensor_of(source, name).nbytes for name in target.names.values()))
    with whole(out, TOOL) as pending:
        tell(f"writing {target.architecture}")
        parameters = save_model(source, target, pending, shard_bytes)
        if tokenizer is not None:
            tokenizer.write(pending, getattr(config, "max_position_embeddings", None) or _NO_LIMIT)
        tell("comparing with the trained model")
        compared, checksums = compare_folder(source, target, pending)
        facts = {"architecture": target.architecture, "reason": target.reason, "parameters": parameters}
        facts |= {"dtype": source.dtype, **told, **compared}
        _finish(source, pending, facts, checksums)
    return facts


def _export_layout(
    source: Source,
    layout: Layout,
    out: Path,
    tokenizer: SourceTokenizer | KeptTokenizer | None,
    tell: Callable[[str], None],
    shard_bytes: int,
    told: dict[str, Any],
    trained: Source | None = None,
) -> dict[str, Any]:
    """Write a model tensor by tensor, and compare it with the trained one.

    Args:
        source: a decoder of ours.
        layout: what it is written as.
        out: as of :func:`export_trained`.
        tokenizer: as there.
        tell: as there.
        shard_bytes: as there.
        told: further facts.
        trained: the model of transformers that ``source`` is a view of: its logits are compared, too.

    Returns:
        Facts, as of :func:`export`.
    """
    require_room(out, sum(entry.nbytes for entry in _entries(source, layout)))
    with whole(out, TOOL) as pending:
        tell(f"writing {layout.name}")
        parameters = write_model(source, layout, pending, shard_bytes)
        if tokenizer is not None:
            tokenizer.write(pending, source.config.max_positions)
        tell("comparing with the trained model")
        facts: dict[str, Any] = {"architecture": layout.name, "reason": layout.reason, "parameters": parameters}
        compared, checksums = compare(source, layout, pending)
        facts |= {"dtype": source.dtype, **told, **compared}
        if trained is not None:
            facts["logit_difference"] = max(compared["logit_difference"], compare_logits(trained, pending))
        _finish(trained or source, pending, facts, checksums)
    return facts


def _finish(source: Source, folder: Path, facts: dict[str, Any], checksums: dict[str, str]) -> None:
    """Write what else a folder holds: checksums, a model card, and the facts."""
    facts["peak_bytes"] = peak_bytes()
    write_checksums(folder, checksums)
    (folder / "README.md").write_text(model_card(source.state, facts), encoding="utf-8")
    write_json(folder / _FACTS_FILE, {**facts, "step": source.state["step"]})


def write_model(source: Source, layout: Layout, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Store a model as a class: its config, its generation config, its code if it is ours, and its weights.

    Returns:
        Parameters, tied ones once.

    Raises:
        CheckpointError: a tensor has another shape than the layout says.
    """
    from transformers import GenerationConfig

    config = layout.config
    config.architectures = [layout.name]
    config.dtype = NARROW.get(source.dtype, torch.float32)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    for name in layout.files:
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    stored = {entry.name: entry for entry in layout.stored}
    write_shards(folder, _entries(source, layout), lambda name: stored[name].tensor(source), shard_bytes)
    return sum(torch.Size(entry.shape).numel() for entry in layout.stored if not entry.buffer)


def _entries(source: Source, layout: Layout) -> list[Entry]:
    return [Entry(stored.name, stored.shape, stored.kind(source.dtype)) for stored in layout.stored]


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage's number is inherited from the process that started this one.
        lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
