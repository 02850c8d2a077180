"""Holds an exported folder against the trained model: every tensor, every expert, every block, and the logits.

Layer by layer, both sides beside each other, so that neither model is ever in memory as a whole.
"""

import contextlib
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.closeness import MARGIN, margins, require_close
from mocte_ds.convert.hf.dense import Layout
from mocte_ds.convert.hf.pieces import Pieces
from mocte_ds.convert.hf.same_experts import compare_experts
from mocte_ds.errors import CheckpointError
from mocte_ds.models.layers import rotary_angles
from mocte_ds.moe.block import Block
from mocte_ds.moe.forward import ForwardState
from mocte_ds.ownership.checksums import checksum

PROBE = (4, 64)


@dataclass
class _Run:
    """Features (B, T, d) of the same tokens in the trained model, in the export, and in the export in bf16."""

    ids: Tensor
    ours: Tensor
    theirs: Tensor
    narrow: Tensor | None
    decided: Tensor
    """(B, T) whether a position and all before it are clear of every gate's boundaries."""


def compare(source: Source, layout: Layout, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a folder back as transformers do and compare it with the model that was to be exported, in fp32.

    Args:
        source: the trained model, with the weights rounded as they were written; of `bf16` it is measured too what
            computing in bf16 changes.
        layout: the class that it was written as.
        folder: the export.

    Returns:
        Facts: logit_difference (relative to the largest logit), changed_predictions (share of tokens, computed in the
        source's dtype), tensors_compared, experts_compared. And the checksum of every tensor.

    Raises:
        CheckpointError: a tensor is missing or changed, an expert stands in another one's place, or outputs differ by
            more than rounding.
    """
    pieces = Pieces(folder, layout)
    checksums = _compare_tensors(source, layout, pieces)
    facts = compare_function(source, layout, pieces)
    return {**facts, "tensors_compared": len(checksums)}, checksums


def compare_function(source: Source, layout: Layout, pieces: Pieces) -> dict[str, Any]:
    """Compare what the layers compute, one after the other, and the logits.

    Args:
        source: our model; of `bf16` it is measured too what computing in bf16 changes.
        layout: the class of the folder.
        pieces: of the folder.

    Returns:
        Facts: logit_difference, changed_predictions, experts_compared.

    Raises:
        CheckpointError: an expert stands in another one's place, or outputs differ by more than rounding.
    """
    run = _begin(source)
    experts, first = 0, run.ours
    gc.collect()
    gc.freeze()  # what is there already need not be looked through once a layer
    try:
        for layer in range(source.config.num_layers):
            experts += _step(source, layout, pieces, run, layer)
            gc.collect()  # models of transformers hold themselves by cycles
            if layer == 0:
                first = run.ours.clone()
                decided = run.decided.clone()
    finally:
        gc.unfreeze()
    if run.decided.float().mean() < 0.25:
        raise CheckpointError(
            "some gate has experts with the same row, between which rounding decides; such a model cannot be compared. "
            "Rows that training has not told apart yet are the usual reason: take a checkpoint of a later step."
        )
    difference, changed = _compare_ends(source, layout, pieces, run, first, decided)
    return {"logit_difference": difference, "changed_predictions": changed, "experts_compared": experts}


def _compare_tensors(source: Source, layout: Layout, pieces: Pieces) -> dict[str, str]:
    files, checksums = pieces.shards.files, {}
    extra = files.keys() - {stored.name for stored in layout.stored}
    if extra:
        raise CheckpointError(f"{pieces.folder} holds {min(extra)}, which {layout.name} does not have.")
    for stored in layout.stored:
        checksums[stored.name] = checksum(stored.tensor(source))
        if stored.name not in files or checksum(pieces.shards.read(stored.name)) != checksums[stored.name]:
            raise CheckpointError(
                f"{pieces.folder}: the weight {stored.name} was lost or changed on its way through the file."
            )
    return checksums


def _begin(source: Source) -> _Run:
    batch, length = PROBE[0], min(PROBE[1], source.config.max_positions)
    ids = torch.randint(source.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    x = source.read("model.embed_tokens.weight")[ids]
    if source.config.style == "gpt2":
        x = x + source.read("model.embed_positions.weight")[:length]
    return _Run(ids, x, x, x.bfloat16() if source.dtype == "bf16" else None, torch.ones(ids.shape, dtype=torch.bool))


def _pass_of(layer: nn.Module, ids: Tensor) -> Any:
    """A forward pass for a layer that is called by itself."""
    if not isinstance(layer.mlp, Block):
        return contextlib.nullcontext()
    return layer.mlp.context.running(ForwardState(ids, layer.mlp.context.eod_id))


@torch.no_grad()
def _step(source: Source, layout: Layout, pieces: Pieces, run: _Run, number: int) -> int:
    """One layer of all; the number of experts that were compared."""
    layer, theirs = source.part(f"model.layers.{number}"), pieces.layer(number, torch.float32)
    count = 0
    if number in source.emerged or number in layout.blocks:
        count = compare_experts(source.blocks[number], layer.mlp, theirs, pieces)
    if isinstance(layer.mlp, Block):

        def look(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            run.decided &= margins(block, inputs[0]) > MARGIN

        layer.mlp.register_forward_pre_hook(look)
    rotation = None
    if source.config.style == "llama":
        rotation = rotary_angles(source.config, run.ids.shape[1], run.ours)
    with _pass_of(layer, run.ids):
        run.ours = layer(run.ours, rotation)
    # Attention carries a token's other expert to all positions behind it.
    run.decided = run.decided.cummin(dim=1).values
    del layer
    run.theirs = pieces.run(layout.step, theirs, run.theirs, run.ids)
    if run.decided.any():
        require_close(
            run.theirs[run.decided], run.ours[run.decided], f"{pieces.folder}: the features behind layer {number}"
        )
    del theirs
    if run.narrow is not None:
        run.narrow = pieces.run(layout.step, pieces.layer(number, torch.bfloat16), run.narrow, run.ids)
    return count


@torch.no_grad()
def _compare_ends(
    source: Source, layout: Layout, pieces: Pieces, run: _Run, first: Tensor, decided: Tensor
) -> tuple[float, float]:
    """Embedding, final norm and output matrix: difference of the logits, share of changed predictions.

    Args:
        first: (B, T, d) our features behind the first layer.
        decided: (B, T) positions clear of the first layer's boundaries.
    """
    norm = source.part("model.norm")
    weight = source.read("model.embed_tokens.weight" if source.config.tied else "lm_head.weight")
    of_one, expected = F.linear(norm(first), weight), F.linear(norm(run.ours), weight)
    del weight
    model = pieces.layer(0, torch.float32, whole=True)
    found = pieces.run(model, run.ids).logits
    require_close(found[decided], of_one[decided], f"{pieces.folder}: logits of the first layer alone")
    logits = _logits(layout, pieces, model, run.ids, run.theirs)
    clear = run.decided
    difference = require_close(logits[clear], expected[clear], f"{pieces.folder}: logits")
    if run.narrow is not None:
        del model
        model = pieces.layer(0, torch.bfloat16, whole=True)
        logits = _logits(layout, pieces, model, run.ids, run.narrow)
    return difference, (logits.argmax(-1) != expected.argmax(-1)).float().mean().item()


def _logits(layout: Layout, pieces: Pieces, model: nn.Module, ids: Tensor, features: Tensor) -> Tensor:
    """What a model of one layer makes of other features behind that layer."""
    hook = model.get_submodule(f"{layout.layers}.0").register_forward_hook(lambda *_: features)
    try:
        return pieces.run(model, ids).logits
    finally:
        hook.remove()
