"""Exports a checkpoint to Hugging Face format: exact, checked against the trained model before it says done."""

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from mocte_ds.checkpoints.hf.card import model_card
from mocte_ds.checkpoints.hf.compare import compare
from mocte_ds.checkpoints.hf.dense import Layout
from mocte_ds.checkpoints.hf.layouts import choose_layout
from mocte_ds.checkpoints.hf.shards import SHARD_BYTES, Entry, write_shards
from mocte_ds.checkpoints.hf.tokenizer import SourceTokenizer
from mocte_ds.checkpoints.source import Source, StoredSource, find_tag
from mocte_ds.errors import CheckpointError, ConfigError

_FACTS_FILE, _CHECKSUMS_FILE = "export.json", "checksums.json"


def export(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "fp32",
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
        dtype: `fp32` or `bf16` weights; gates are stored in fp32 always. Computing in bf16 sends the few tokens near a
            boundary to another expert; loaded with dtype=torch.float32, either export routes as the trained model.
        tokenizer_path: sentencepiece model; None: the one of the run.
        tell: called with a line for each stage.
        choice: `stock`, `own` or `auto`: see :func:`mocte_ds.checkpoints.hf.layouts.choose_layout`.
        shard_bytes: largest file of weights.

    Returns:
        Facts: architecture, reason (why it is no stock class), parameters, dtype, checkpoint_bytes (files with
        weights), start_bytes and peak_bytes (memory of this process at the start, and at most so far), and what was
        compared (see mocte_ds.checkpoints.hf.compare).

    Raises:
        CheckpointError: the checkpoint is none, damaged, or fits no class (says what to change); the written model
            differs; the folder cannot be written.
        ConfigError: an unknown dtype or choice, or an ``out`` that holds something else.
    """
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"dtype = {dtype!r} is not one of ['fp32', 'bf16'].")
    start = psutil.Process().memory_info().rss
    folder = find_tag(checkpoint)
    out = _require_free(Path(out), folder)
    tell(f"reading {folder}")
    source = StoredSource(folder, dtype)
    tokenizer = SourceTokenizer(_tokenizer_path(tokenizer_path, source.state["tokenizer"], folder))
    tokenizer.require_fit(source.config.vocab_size)
    layout = choose_layout(source, tokenizer.special, choice)
    with _whole(out) as pending:
        tell(f"writing {layout.name}")
        parameters = write_model(source, layout, pending, shard_bytes)
        tokenizer.write(pending, source.config.max_positions)
        tell("comparing with the trained model")
        facts: dict[str, Any] = {"architecture": layout.name, "reason": layout.reason, "parameters": parameters}
        facts |= {"dtype": dtype, "checkpoint_bytes": source.checkpoint_bytes, "start_bytes": start}
        compared, checksums = compare(source, layout, pending)
        facts |= compared
        facts["peak_bytes"] = _peak_bytes()
        _write_json(pending / _CHECKSUMS_FILE, checksums)
        (pending / "README.md").write_text(model_card(source.state, facts), encoding="utf-8")
        _write_json(pending / _FACTS_FILE, {**facts, "step": source.state["step"]})
    return facts


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
    config.dtype = {"fp32": "float32", "bf16": "bfloat16"}[source.dtype]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    for name in layout.files:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    stored = {entry.name: entry for entry in layout.stored}
    entries = [Entry(entry.name, entry.shape, entry.kind(source.dtype)) for entry in layout.stored]
    write_shards(folder, entries, lambda name: stored[name].tensor(source), shard_bytes)
    return sum(torch.Size(entry.shape).numel() for entry in layout.stored if not entry.buffer)


def _peak_bytes() -> int:
    """Largest memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage's number is inherited from the process that started this one.
        lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _tokenizer_path(named: str | Path | None, trained: str | None, folder: Path) -> Path:
    """The tokenizer of a run, wherever the run's folder lies by now."""
    if named:
        return Path(named)
    beside = folder.parent.parent / "tokenizer.model"
    for path in (Path(trained) if trained else beside, beside):
        if path.is_file():
            return path
    raise CheckpointError(
        f"no tokenizer: the checkpoint names {trained or 'none'} and {beside} is not there either; name the "
        "sentencepiece model with --tokenizer."
    )


def _require_free(out: Path, checkpoint: Path) -> Path:
    """``out`` as a full path, if nothing but an earlier export is there."""
    out, checkpoint = out.absolute().resolve(), checkpoint.resolve()
    if out == checkpoint or out in checkpoint.parents or checkpoint in out.parents:
        raise ConfigError(f"{out} and the checkpoint {checkpoint} overlap; write the export to a folder of its own.")
    try:
        if out.is_dir():
            taken = any(out.iterdir()) and not (out / _FACTS_FILE).is_file()
        else:
            taken = out.exists()
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}.") from error
    if taken:
        raise ConfigError(f"{out} holds something else than an export of ours; remove it or name another folder.")
    return out


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all went well, and vanishes otherwise."""
    pending = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        pending.mkdir(parents=True)
        yield pending
        mask = os.umask(0)
        os.umask(mask)
        for path in pending.iterdir():
            path.chmod(0o666 & ~mask)  # safetensors leaves its files to the owner alone
        _swap(pending, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {out}: {error}. Nothing was changed there.") from error
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def _swap(pending: Path, out: Path) -> None:
    """Put a folder in another one's place, or leave that one where it is."""
    if not out.exists():
        os.replace(pending, out)
        return
    old = out.with_name(f"{out.name}.{os.getpid()}.old")
    os.replace(out, old)
    try:
        os.replace(pending, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
