"""Kinds of experts, routers, models and batches in a few steps on ranks that cut matrices, or on one that does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.engine import runs
from tests.engine.tensor_runs import model, settings

MIXED = {"router": {"kind": "random", "weight": "softmax", "learn": True, "top_k": 2, "aux": 0.01, "normalise": True}}
SPREAD = {"ep_size": 2}


@dataclass(frozen=True)
class Variant:
    """How a run differs from the plain one."""

    mocte: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False
    seeds: bool = False
    """Whether each rank draws a model of its own."""
    frozen: str = " "
    """Parameters with this in their names do not train."""
    batch: tuple[int, int] = (runs.MICRO, runs.LENGTH)
    """Sequences and tokens of each."""
    loader: bool = False
    """Whether `initialize` makes the loader."""
    alike: int | None = None
    """How many of the numbers are those of one rank; None: all."""


VARIANTS = {
    "two experts of a token, learned": Variant(MIXED),
    "bypasses, spread": Variant({"expert": {"kind": "lora", "width": 8}, **SPREAD}),
    "tied embeddings, recomputed, spread": Variant(SPREAD, model={"tied": True}, recompute=True),
    "normalised heads, stage 1, the loader of initialize": Variant(
        deepspeed={"zero_optimization": {"stage": 1}}, model={"kind": "qwen3"}, loader=True
    ),
    "frozen norms of heads, other seeds": Variant(SPREAD, model={"kind": "qwen3"}, frozen="_norm.", seeds=True),
    "biases of queries, keys and values, a frozen matrix that is cut": Variant(
        SPREAD, model={"kind": "qwen2"}, frozen="o_proj"
    ),
    "a frozen front, bf16": Variant({"freeze": {"prefix": {"layers": 1}}}, {"bf16": {"enabled": True}}),
    "moving clusters, two banks, spread": Variant(
        {"banks": [{"kind": "online", "directions": 8}, {"kind": "token"}], **SPREAD}
    ),
    "biases everywhere, dropout of whole features": Variant(
        SPREAD, model={"kind": "phi", "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    ),
    "dropout within attention": Variant(model={"attention_dropout": 0.2, "attn_implementation": "eager"}),
    # Four losses and two norms of warm-up; experts draw for the tokens that a rank has.
    "dropout within experts": Variant(SPREAD, model={"kind": "starcoder2", "residual_dropout": 0.1}, alike=6),
    # Clusters of a dozen features hang on their last bits; these routers need none.
    "three tokens": Variant({**MIXED, **SPREAD}, batch=(1, 3)),
    "one token": Variant({**MIXED, **SPREAD}, batch=(1, 1)),
}
STEPS, MICROS = 6, 2


def variants(tensor: int) -> dict[str, Any]:
    """By name, losses and gradient norms around births by hand, and draws after them; one data-parallel rank."""
    return {name: _run(variant, tensor) for name, variant in VARIANTS.items()}


def _run(variant: Variant, tensor: int) -> dict[str, list[float]]:
    import mocte_ds

    block = {**variant.mocte, "auto": False}
    ep_size = min(block.pop("ep_size", 1), tensor)
    config = {**settings(tensor, ep_size, **{"freeze": {"policy": "off"}, **block}), **variant.deepspeed}
    config["train_micro_batch_size_per_gpu"] = variant.batch[0]
    made = model(seed=dist.get_rank() if variant.seeds else 0, **variant.model)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(variant.frozen not in name)
    if variant.recompute:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7 + dist.get_rank())  # all ranks draw as the first one does
    given = list(_batches(variant))
    engine, _, loader, _ = mocte_ds.initialize(model=made, config=config, training_data=_rows(given, variant))
    batches = iter(loader) if variant.loader else iter(given)
    numbers: list[float] = []
    heads = variant.model.get("attention_dropout") and tensor == 1
    with mock.patch.object(functional, "dropout", _in_halves(functional.dropout) if heads else functional.dropout):
        for number in range(STEPS):
            for _ in range(MICROS):
                loss = _loss(engine, next(batches))
                engine.backward(loss)
                engine.step()
                numbers.append(float(loss.detach()))
            numbers.append(float(engine.get_global_grad_norm()))
            _change(engine.mocte, number)
    engine.destroy()
    return {"numbers": numbers, "drawn": torch.rand(3).tolist()}


def _batches(variant: Variant) -> Iterator[dict[str, Tensor]]:
    rows, length = variant.batch
    for number in range(STEPS):
        for turn in range(MICROS):
            yield {"input_ids": runs.batch(number, turn)[0][:rows, :length]}


def _rows(batches: list[dict[str, Tensor]], variant: Variant) -> list[dict[str, Tensor]] | None:
    return [{"input_ids": row} for batch in batches for row in batch["input_ids"]] if variant.loader else None


def _loss(engine: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    if ids.shape[1] > 1:
        return engine(input_ids=ids, labels=ids).loss
    return engine(input_ids=ids).logits.logsumexp(-1).mean()


def _change(mocte: Any, number: int) -> None:
    """Births and freezes after some steps."""
    if number == 1:
        mocte.emerge(block=0)
        mocte.emerge(block=1)
    if number == 3:
        for expert in range(len(mocte.blocks[0].experts)):
            mocte.freeze(block=0, expert=expert)
        if mocte.config.freeze.prefix.layers:
            mocte.freeze_prefix(1)


def _in_halves(dropout: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Dropout that gives the second half of the heads the masks of the first, as two tensor ranks do."""

    def dropped(scores: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if scores.dim() != 4:
            return dropout(scores, p, training, inplace)
        batch, heads, *sizes = scores.shape
        half = dropout(torch.ones(batch, heads // 2, *sizes), p, training)
        return scores * half.repeat(1, 2, 1, 1)

    return dropped
