"""Checkpoints of a tiny Llama, written on two processes by the engines as launch/pretrain.py uses them."""

from pathlib import Path
from typing import Any

import torch

from mocte_ds.base_model import base_facts
from tests.small_models import loss_of, small_llama

VOCAB, STEPS = 340, 3


def model() -> Any:
    """What they train."""
    return small_llama(VOCAB, heads=4, num_key_value_heads=2, positions=48)


def config(**changes: Any) -> dict[str, Any]:
    """DeepSpeed config with two experts per rank."""
    block = {
        "modules": "model.layers.*.mlp",
        "num_experts": 4,
        "ep_size": 2,
        "auto": False,
        "total_steps": 100,
        "router": {"kind": "token", "bias": False},
        "spectrum": {"rank": 4, "rows": 256, "documents": 32},
        "freeze": {"rows": 32, "iterations": 2},
    }
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-2, "torch_adam": True}},
        "mocte": {**block, **changes},
    }


def write(folder: str, tokenizer: str) -> dict[str, Any]:
    """Train and save three runs: `ffn` experts in all layers, `lora` in the last, and a dense one.

    Returns:
        This rank's experts as they were saved, by run, block and global number: lists of matrices as numpy arrays.
    """
    import mocte_ds

    experts = {}
    runs = {"ffn": config(), "lora": config(modules="model.layers.1.mlp", expert={"kind": "lora", "width": 16})}
    for name, settings in runs.items():
        torch.manual_seed(0)
        engine, *_ = mocte_ds.initialize(model=model(), config=settings)
        train(engine, 0)
        for block in range(len(engine.mocte.blocks)):
            engine.mocte.emerge(block)
        train(engine, STEPS)
        engine.mocte.freeze(0, 1)
        train(engine, 2 * STEPS)
        _save(engine, Path(folder) / name, tokenizer)
        rank = torch.distributed.get_rank()
        experts[name] = {
            (handle.name, rank * 2 + k): {key: value.float().numpy() for key, value in expert.state_dict().items()}
            for handle in engine.mocte.blocks
            for k, expert in enumerate(handle.block.banks[0].local_experts)
        }
    _dense(Path(folder) / "dense", tokenizer)
    return experts


def _dense(folder: Path, tokenizer: str) -> None:
    import deepspeed

    from mocte_ds.training import saving

    settings = {key: value for key, value in config().items() if key != "mocte"}
    made = model()
    engine, *_ = deepspeed.initialize(model=made, model_parameters=made.parameters(), config=settings)
    saving.prepare(engine, {})
    train(engine, 0)
    _save(engine, folder, tokenizer)


def train(engine: Any, first: int) -> None:
    """Some steps, on other tokens for each step and rank."""
    rank = torch.distributed.get_rank()
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tokens = torch.randint(4, VOCAB, (4, 33), generator=generator)
        engine.backward(loss_of(engine, tokens[:, :-1], tokens[:, 1:]))
        engine.step()


def _save(engine: Any, folder: Path, tokenizer: str) -> None:
    from mocte_ds.training import saving

    state = {"base": base_facts(engine.module), "tokenizer": tokenizer, "tokens": engine.global_steps * 256}
    saving.save(engine, folder, f"step{engine.global_steps}", state)
