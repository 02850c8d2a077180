"""Exports a checkpoint to a stock transformers class: exact, checked against the trained model before it says done."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mocte_ds.checkpoints.hf.compare import compare
from mocte_ds.checkpoints.hf.dense import Layout
from mocte_ds.checkpoints.hf.layouts import choose_layout
from mocte_ds.checkpoints.hf.tokenizer import SourceTokenizer
from mocte_ds.checkpoints.model import find_tag, load_model
from mocte_ds.errors import CheckpointError, ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FACTS_FILE = "export.json"


def export(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    tokenizer_path: str | Path | None = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, without code of ours.

    Args:
        checkpoint: folder of checkpoints or of one tag; only read.
        out: folder to write; appears as a whole at the end, never half. An earlier export there is replaced.
        dtype: `fp32` or `bf16` weights; gates are stored in fp32 always. Computing in bf16 sends the few tokens near a
            boundary to another expert; loaded with dtype=torch.float32, either export routes as the trained model.
        tokenizer_path: sentencepiece model; None: the one of the run.
        tell: called with a line for each stage.

    Returns:
        Facts: architecture, parameters, dtype, and what was compared (see mocte_ds.checkpoints.hf.compare).

    Raises:
        CheckpointError: the checkpoint is none, damaged, or fits no stock class (says what to change); the written
            model differs; the folder cannot be written.
        ConfigError: an unknown dtype, or an ``out`` that holds something else.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not one of {list(_DTYPES)}.")
    folder = find_tag(checkpoint)
    out = _require_free(Path(out), folder)
    tell(f"reading {folder}")
    model, state = load_model(folder)
    tokenizer = SourceTokenizer(_tokenizer_path(tokenizer_path, state["tokenizer"], folder))
    tokenizer.require_fit(model.config.vocab_size)
    if dtype == "bf16":
        model.to(torch.bfloat16).float()  # rounds in place; gates keep their precision
    layout = choose_layout(model, tokenizer.special)
    with _whole(out) as pending:
        tell(f"writing {layout.name}")
        parameters = write_model(layout, pending, dtype)
        tokenizer.write(pending, model.config.max_positions)
        tell("comparing with the trained model")
        facts = {"architecture": layout.name, "parameters": parameters, "dtype": dtype}
        facts |= compare(model, layout, pending, dtype)
        (pending / "README.md").write_text(_card(state, facts), encoding="utf-8")
        (pending / _FACTS_FILE).write_text(json.dumps({**facts, "step": state["step"]}, indent=1), encoding="utf-8")
    return facts


def write_model(layout: Layout, folder: Path, dtype: str) -> int:
    """Store a model as its stock class.

    Returns:
        Parameters, tied ones once.

    Raises:
        CheckpointError: the class has other tensors than the layout.
    """
    kind = _DTYPES[dtype]
    with torch.device("meta"):
        target = layout.make()
    weights = {name: weight if name in layout.routers else weight.to(kind) for name, weight in layout.weights.items()}
    try:
        missing, unexpected = target.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{layout.name} does not take this model: {error}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{layout.name} does not take this model: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    target.tie_weights()
    target.config.dtype = kind
    target.save_pretrained(folder, max_shard_size="2GB")
    return sum(parameter.numel() for parameter in target.parameters())


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


def _card(state: dict[str, Any], facts: dict[str, Any]) -> str:
    """Model card of the exported folder."""
    lines = [f"- parameters: {facts['parameters']:,}", f"- trained tokens: {state['tokens']:,} ({state['step']} steps)"]
    for block in state["blocks"]:
        frozen = sum(mode == "frozen" for mode in block["experts"])
        lines.append(f"- {block['name']}: {block['mode']}, {len(block['experts'])} experts, {frozen} frozen")
    lines.append(f"- largest difference of logits from the checkpoint's, relative: {facts['logit_difference']:.1e}")
    if facts["dtype"] == "bf16":
        share = facts["changed_predictions"]
        lines.append(
            f"- computed in bf16, {share:.1%} of random tokens have another likeliest successor; "
            "load with dtype=torch.float32 to compute as the checkpoint does"
        )
    origin = "Pre-trained with MO-CTE (cluster-oriented, trainability-aware experts)"
    head = f"# Model exported by mocte-ds\n\n{origin}; stored as {facts['architecture']}."
    return head + "\n\n" + "\n".join(lines) + "\n"
