"""Holds an exported folder against the trained model: every tensor, every expert, every block, and the logits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.hf.dense import Layout
from mocte_ds.checkpoints.hf.layouts import ffn_blocks
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode

# Largest accepted difference in fp32, relative to the largest value; sums are taken in another order.
TOLERANCE = 1e-4
# Tokens whose two best experts are closer than this, relative to |gate| |feature|, may go to either by rounding.
MARGIN = 2e-6
PROBE = (4, 64)


def compare(model: nn.Module, layout: Layout, folder: Path, dtype: str) -> dict[str, Any]:
    """Read a folder back as a user would and compare it with the model that was to be exported, in fp32.

    Args:
        model: the trained model, with the weights rounded as they were written.
        layout: the class that it was written as.
        folder: the export.
        dtype: `fp32`, or `bf16`: what computing in bf16 changes is measured too.

    Returns:
        logit_difference (relative to the largest logit), changed_predictions (share of tokens, in ``dtype``),
        tensors_compared, experts_compared.

    Raises:
        CheckpointError: a tensor is missing or changed, an expert stands in another one's place, or outputs differ by
            more than rounding.
    """
    found = _read(folder, torch.float32)
    written = found.state_dict()
    for name, weight in layout.weights.items():
        if name not in written or not torch.equal(written[name], weight.float()):
            raise CheckpointError(f"{folder}: the weight {name} was lost or changed on its way through the file.")
    experts = _compare_experts(model, found, folder)
    ids = _probe_ids(model)
    expected, decided = _logits_and_decided(model, ids)
    logits = _run(found, ids, folder).logits
    difference = _relative(logits[decided], expected[decided])
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: logits differ from the trained model's by {difference:.1e} of their largest value (allowed: "
            f"{TOLERANCE:.0e}); the export would be another model."
        )
    if dtype == "bf16":
        del found, written
        logits = _run(_read(folder, torch.bfloat16), ids, folder).logits
    changed = (logits.argmax(-1) != expected.argmax(-1)).float().mean().item()
    return {
        "logit_difference": difference,
        "changed_predictions": changed,
        "tensors_compared": len(layout.weights),
        "experts_compared": experts,
    }


def _read(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        found, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # safetensors and transformers raise many types for a folder that does not fit
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"transformers cannot load {folder}: {text[0]}") from error
    lost = {key: [str(value) for value in values][:3] for key, values in info.items() if values}
    if lost:
        raise CheckpointError(f"transformers could not load everything of {folder}: {lost}.")
    return found.eval()


@torch.no_grad()
def _run(part: nn.Module, inputs: Tensor, folder: Path) -> Any:
    try:
        return part(inputs)
    except RuntimeError as error:
        text = str(error).strip().splitlines() or ["RuntimeError"]
        raise CheckpointError(
            f"transformers loads {folder} but cannot run it: {text[0]} (its kernels want a hidden_size that is a "
            "multiple of 4 in fp32 and of 8 in bf16)."
        ) from error


def _compare_experts(model: nn.Module, found: nn.Module, folder: Path) -> int:
    """Every expert by its number, and every block's function near every row of its gate; the number of experts."""
    ours, count = ffn_blocks(model), 0
    layers = getattr(getattr(found, "model", None), "layers", [])
    theirs = {i: layer.mlp for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
    lost = [block.name for i, block in ours.items() if block.mode is not BlockMode.WARMUP and i not in theirs]
    if lost:
        raise CheckpointError(f"{folder}: the experts of {lost} are not there.")
    for i, stock in theirs.items():
        block = ours[i]
        experts = block.banks[0].local_experts
        if stock.experts.down_proj.shape[0] != len(experts):
            raise CheckpointError(f"{folder}: {block.name} has {len(experts)} experts, the export has another number.")
        for k, expert in enumerate(experts):
            gate, up = stock.experts.gate_up_proj[k].chunk(2)
            stored = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": stock.experts.down_proj[k]}
            for name, weight in expert.state_dict().items():
                if not _is_filled_up(stored[name], weight):
                    raise CheckpointError(f"{folder}: {name} of expert {k} of {block.name} is not the trained one.")
        _compare_block(block, stock, folder)
        count += len(experts)
    return count


@torch.no_grad()
def _compare_block(block: Block, stock: nn.Module, folder: Path) -> None:
    """Features around each row of the gate, so that no expert goes unseen only because few texts lead to it."""
    rows = block.banks[0].gate.linear()[0].float()
    generator = torch.Generator().manual_seed(0)
    near = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30) * rows.shape[1] ** 0.5
    features = near.repeat_interleave(8, dim=0)
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    if block.mode is not BlockMode.WARMUP:
        features = features[_margins(features, rows) > MARGIN]
    if not len(features):
        return  # a gate of equal rows, which the logits will show
    expected, output = block(features[None]), _run(stock, features[None], folder)
    difference = _relative(output, expected)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: the outputs of {block.name} differ from the trained block's by {difference:.1e} of their "
            f"largest value (allowed: {TOLERANCE:.0e})."
        )


@torch.no_grad()
def _logits_and_decided(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V), and whether a position (B, T) and all before it are clear of every gate's boundaries."""
    decided = torch.ones(ids.shape, dtype=torch.bool)

    def look(block: Block, inputs: tuple[Tensor, ...]) -> None:
        decided.logical_and_(_margins(inputs[0], block.banks[0].gate.linear()[0]) > MARGIN)

    hooks = [
        block.register_forward_pre_hook(look)
        for block in ffn_blocks(model).values()
        if block.mode is not BlockMode.WARMUP
    ]
    try:
        logits = model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    # Attention carries a token's other expert to all positions behind it.
    decided = decided.cummin(dim=1).values
    if decided.float().mean() < 0.25:
        raise CheckpointError(
            "some gate has experts with the same row, between which rounding decides; such a model cannot be compared."
        )
    return logits, decided


def _margins(features: Tensor, rows: Tensor) -> Tensor:
    """How much the best expert's logit exceeds the second's, relative to |gate| |feature|: (...,) for (..., d)."""
    best = torch.nn.functional.linear(features, rows).topk(2, dim=-1).values
    scale = rows.norm(dim=1).max() * features.norm(dim=-1)
    return (best[..., 0] - best[..., 1]) / scale.clamp(min=1e-30)


def _probe_ids(model: nn.Module) -> Tensor:
    length = min(PROBE[1], model.config.max_positions)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (PROBE[0], length), generator=generator)


def _is_filled_up(matrix: Tensor, trained: Tensor) -> bool:
    """Whether a matrix is the trained one, with nothing but zeros behind its last row or column."""
    rows, columns = trained.shape
    return torch.equal(matrix[:rows, :columns], trained) and not (matrix[rows:].any() or matrix[:, columns:].any())


def _relative(values: Tensor, expected: Tensor) -> float:
    return ((values - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
