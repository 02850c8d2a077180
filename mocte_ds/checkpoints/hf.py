"""Exports a checkpoint to a stock transformers class: exact, checked against the trained model before it says done."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mocte_ds.checkpoints.hf_layouts import Layout, choose_layout
from mocte_ds.checkpoints.hf_tokenizer import export_tokenizer
from mocte_ds.checkpoints.model import load_model
from mocte_ds.errors import CheckpointError

# Largest accepted difference of logits in fp32, relative to the largest logit; sums are taken in another order.
FP32_TOLERANCE = 1e-4
PROBE = (2, 64)


def export(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    tokenizer_path: str | Path | None = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, without code of ours.

    Args:
        checkpoint: folder of checkpoints or of one tag.
        out: folder to write; replaced as a whole at the end, never half.
        dtype: `fp32` or `bf16` weights. Routers keep fp32 precision of their choice only in `fp32`.
        tokenizer_path: sentencepiece model; None: the one the checkpoint names.
        tell: called with a line for each stage.

    Returns:
        Facts: architecture, parameters, largest difference of logits, share of tokens whose best next token differs,
        experts compared.

    Raises:
        CheckpointError: the run fits no stock class (says what to change), or the written model differs.
    """
    tell("reading the checkpoint")
    model, state = load_model(checkpoint)
    layout = choose_layout(model, state)
    tokenizer_path = Path(tokenizer_path or state["tokenizer"] or "")
    out = Path(out)
    pending = out.with_name(out.name + ".tmp")
    shutil.rmtree(pending, ignore_errors=True)
    try:
        pending.mkdir(parents=True)
        tell(f"writing {layout.name}")
        _write_model(layout, pending, torch.bfloat16 if dtype == "bf16" else torch.float32)
        export_tokenizer(tokenizer_path, pending, model.config.max_positions)
        tell("comparing with the trained model")
        facts = compare(model, layout, pending, dtype)
        facts = {"architecture": layout.name, "parameters": sum(t.numel() for t in layout.weights.values()), **facts}
        (pending / "README.md").write_text(_card(state, facts), encoding="utf-8")
        (pending / "export.json").write_text(json.dumps({**facts, "step": state["step"]}, indent=1), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(pending, out)
    except OSError as error:
        raise CheckpointError(f"could not write {out}: {error}.") from error
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    return facts


def _write_model(layout: Layout, folder: Path, dtype: torch.dtype) -> None:
    target = layout.make().to(torch.float32)
    missing, unexpected = target.load_state_dict(layout.weights, strict=False)
    missing = [name for name in missing if name != "lm_head.weight" or not layout.tied]
    if missing or unexpected:
        raise CheckpointError(
            f"{layout.name} does not take this model: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    target.to(dtype).save_pretrained(folder, max_shard_size="2GB")


def compare(model: nn.Module, layout: Layout, folder: Path, dtype: str) -> dict[str, Any]:
    """Read the folder back as a user would and hold it against the trained model.

    Raises:
        CheckpointError: weights are missing or changed, or logits differ by more than rounding.
    """
    from transformers import AutoModelForCausalLM

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    found, info = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, output_loading_info=True)
    lost = {key: sorted(values)[:3] for key, values in info.items() if values and key != "error_msgs"}
    if lost:
        raise CheckpointError(f"transformers could not load everything of {folder}: {lost}.")
    written = found.state_dict()
    for name, weight in layout.weights.items():
        if not torch.equal(written[name], weight.to(kind)):
            raise CheckpointError(f"{folder}: the weight {name} changed on its way through the file.")
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE[1], model.config.max_positions)
    ids = torch.randint(4, model.config.vocab_size, (PROBE[0], length), generator=generator)
    with torch.no_grad():
        expected, logits = model(ids), found.eval()(input_ids=ids).logits.float()
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    flipped = (logits.argmax(-1) != expected.argmax(-1)).float().mean().item()
    # In bf16 the features are rounded, so that tokens near a boundary may take another expert.
    if difference > FP32_TOLERANCE and dtype == "fp32":
        raise CheckpointError(
            f"{folder}: logits differ from the trained model's by {difference:.1e} of their largest value (allowed: "
            f"{FP32_TOLERANCE:.0e}); the export would be another model."
        )
    if flipped > 0.2:
        raise CheckpointError(f"{folder}: {flipped:.0%} of the predicted tokens differ from the trained model's.")
    return {"logit_difference": difference, "changed_predictions": flipped, "tensors_compared": len(layout.weights)}


def _card(state: dict[str, Any], facts: dict[str, Any]) -> str:
    """Model card of the exported folder."""
    lines = [f"- parameters: {facts['parameters']:,}", f"- trained tokens: {state['tokens']:,} ({state['step']} steps)"]
    for block in state["blocks"]:
        frozen = sum(mode == "frozen" for mode in block["experts"])
        lines.append(f"- {block['name']}: {block['mode']}, {len(block['experts'])} experts, {frozen} frozen")
    lines.append(f"- largest difference of logits from the training checkpoint: {facts['logit_difference']:.1e}")
    head = "# Model exported by mocte-ds\n\nPre-trained with MO-CTE (cluster-oriented, trainability-aware experts); stored as"
    return f"{head} {facts['architecture']}.\n\n" + "\n".join(lines) + "\n"
