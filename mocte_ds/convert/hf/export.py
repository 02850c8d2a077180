"""Exports a checkpoint to Hugging Face format: exact, checked against the trained model before it says done."""

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from mocte_ds.base_model import longest_context, make_config
from mocte_ds.bigrams import refuse_bigrams
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.source import NARROW, CheckpointSource, Source
from mocte_ds.convert.hf.card import model_card
from mocte_ds.convert.hf.kept_tokenizer import KeptTokenizer, run_tokenizer
from mocte_ds.convert.hf.mixture import find_mixture
from mocte_ds.convert.hf.output_folder import finished_folder, require_free, require_room, write_json
from mocte_ds.convert.hf.shards import SHARD_BYTES
from mocte_ds.convert.hf.tokenizer import SourceTokenizer, SpecialIds
from mocte_ds.convert.hf.trained import choose_target, save_model, tensor_of
from mocte_ds.convert.hf.trained_check import compare_logits, compare_tensors
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership.checksums import write_checksums

CHOICES = ("auto", "stock", "own")
"""What `--class` says."""
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
        choice: as of :func:`export_trained`.
        shard_bytes: largest file of weights.

    Returns:
        Facts: architecture, reason (why it is not a stock class), parameters, dtype, user_keys (files of routing keys
        of the user's own, by their kinds), checkpoint_bytes (files with weights), start_bytes and peak_bytes (memory of
        this process at the start, and at most so far), and what was compared: tensors_compared, experts_compared and
        logit_difference (relative to the largest logit).

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
    source = CheckpointSource(folder, dtype or "fp32")
    told = {"checkpoint_bytes": source.checkpoint_bytes, "start_bytes": start}
    trained, tokenizer = source.state["tokenizer"], None
    if tokenizer_path is not None or trained is not None:
        tokenizer = run_tokenizer(tokenizer_path, trained, folder)
    kept = dtype or (source.kept_dtype if source.of_a_run else None)
    return export_trained(source, out, kept, tokenizer, tell, choice, shard_bytes, told)


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
    """Write the folder of a model of any architecture of transformers; it is in memory as a whole to be compared.

    Args:
        source: from a checkpoint or from a run that goes on.
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
    refuse_bigrams(source.base.get("bigram"), "the checkpoint", "a folder in Hugging Face format")
    source.dtype, out = dtype or source.stored_dtype(), Path(out)
    config = make_config(source.base, out).get_text_config()
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    if tokenizer is not None:
        tokenizer.require_fit(config.vocab_size)
        ids = {name: getattr(tokenizer.special, name) if value is None else value for name, value in ids.items()}
    special, mixture, reason, user_keys = SpecialIds(**ids), None, None, {}
    if choice != "own" and source.emerged:
        try:
            mixture = find_mixture(source)
        except CheckpointError as error:
            if choice == "stock":
                raise
            reason = str(error)
    if mixture:
        architecture, needed = mixture.architecture, mixture.nbytes
    else:
        target = replace(choose_target(source, choice), special=special, reason=reason)
        architecture, user_keys = target.architecture, target.user_keys.files
        needed = sum(tensor_of(source, name).nbytes for name in target.names.values())
    require_room(out, needed)
    with finished_folder(out, TOOL) as pending:
        tell(f"writing {architecture}")
        if mixture:
            parameters, checksums = mixture.write(special, pending, shard_bytes)
        else:
            parameters = save_model(source, target, pending, shard_bytes)
            checksums = compare_tensors(source, target, pending)
        if tokenizer is not None:
            tokenizer.write(pending, longest_context(config, out) or _NO_LIMIT)
        tell("comparing with the trained model")
        facts: dict[str, Any] = {"architecture": architecture, "reason": reason, "parameters": parameters}
        facts["dtype"], facts["user_keys"] = source.dtype, user_keys
        facts |= {**(told or {}), "tokenizer": tokenizer is not None, "tensors_compared": len(checksums)}
        facts["experts_compared"] = sum(block.num_experts for block in source.emerged)
        facts["logit_difference"] = compare_logits(source, pending)
        facts["peak_bytes"] = peak_bytes()
        write_checksums(pending, checksums)
        (pending / "README.md").write_text(model_card(source.state, facts), encoding="utf-8")
        write_json(pending / _FACTS_FILE, {**facts, "step": source.state["step"]})
    return facts


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage's number is inherited from the process that started this one.
        lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
