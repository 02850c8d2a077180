"""A tiny Llama under transformers' Trainer on this rank: planted data, a DeepSpeed config with a block, arguments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.engine import runs

BLOCK = {
    "modules": "model.layers.*.mlp",
    "num_experts": 4,
    "ep_size": 2,
    "check_every": 0.1,
    "eod_id": 0,
    "spectrum": {"rank": 4, "rows": 256, "documents": 32},
    "clusters": {"deadline": 0.5, "not_before": 0.4},
    "freeze": {"policy": "off", "rows": 32, "iterations": 4},
}
"""Experts emerge after step 5 of 10."""
MICRO, TURNS, STEPS, RATE = 4, 2, 10, 5e-3
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}


def config(stage: int = 2, optimizer: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """DeepSpeed config; without an optimizer Trainer makes one; ``changes`` go into the block."""
    found = {**AUTO, "gradient_clipping": "auto", "zero_optimization": {"stage": stage}, "mocte": {**BLOCK, **changes}}
    return found if optimizer is None else {**found, "optimizer": dict(optimizer)}


def rows(count: int = 8 * MICRO * STEPS) -> list[dict[str, torch.Tensor]]:
    """Examples for Trainer, of two halves of the vocabulary."""
    ids = torch.cat([runs.batch(step, 0)[0] for step in range(-(-count // runs.MICRO))])[:count]
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(out: Path, deepspeed: dict[str, Any], **more: Any) -> Any:
    """TrainingArguments on CPUs, in the order of the data."""
    from transformers import TrainingArguments

    usual: dict[str, Any] = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": TURNS,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(out), deepspeed=deepspeed, **{**usual, **more})


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """All parameters of the model on rank 0, those of the experts of all ranks among them; empty elsewhere."""
    from mocte_ds.zero.gathered_weights import whole_weights

    found = whole_weights(engine.module, engine.mesh, engine.zero_optimization_partition_weights())
    return {name: tensor.clone() for name, tensor in (found or {}).items()}
