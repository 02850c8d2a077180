"""A tiny Llama through mocte_ds.initialize, with planted document clusters, on this rank."""

import json
from typing import Any

import torch

VOCAB, LENGTH, MICRO, STEPS = 64, 48, 8, 40


def batch(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of two halves of the vocabulary, one document per sequence; and which half each is."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    domain = torch.arange(MICRO) % 2
    half = VOCAB // 2
    steps = torch.randint(1, 4, (MICRO, LENGTH), generator=generator).cumsum(1) % (half - 1) + 1
    return steps + (half * domain)[:, None], domain


def config(**changes: Any) -> dict[str, Any]:
    """DeepSpeed config of the tiny run; ``changes`` go into the "mocte" block."""
    block = {
        "modules": "model.layers.*.mlp",
        "num_experts": 4,
        "ep_size": 2,
        "check_every": 0.05,
        "eod_id": 0,
        "spectrum": {"rank": 4, "rows": 512, "documents": 64},
        "clusters": {"deadline": 0.2, "not_before": 0.05},
        "freeze": {"policy": "off", "rows": 32, "iterations": 6},
    }
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 2}},
        "mocte": {**block, **({} if "banks" in changes else {"router": {"kind": "token"}}), **changes},
    }


def model() -> torch.nn.Module:
    """The tiny Llama, the same on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(llama)


def run(settings: dict[str, Any], first: int, last: int, load: str | None, save: str | None) -> dict[str, Any]:
    """Steps ``first`` to ``last`` - 1, after loading and before saving where asked."""
    import mocte_ds

    engine, *_ = mocte_ds.initialize(model=model(), config=settings)
    assert engine.module.model.rotary_emb.inv_freq.dtype is torch.float32, "positions are not rounded with the weights"
    events: list[dict] = []
    engine.mocte.on_event(events.append)
    client = engine.load_checkpoint(load)[1] if load else {}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(first, last):
        for turn in range(2):
            ids, domain = batch(step, turn * world + rank)
            engine.mocte.annotate(domain, ["low", "high"])
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    if save:
        engine.save_checkpoint(save, client_state={"note": "kept"})
    return {
        "losses": losses,
        "events": json.loads(json.dumps(events)),
        "modes": [[str(expert.mode) for expert in block.experts] for block in engine.mocte.blocks],
        "gates": [
            {name: value.clone() for name, value in bank.gate.state_dict().items()}
            for block in engine.mocte.blocks
            for bank in block.block.banks
        ],
        "load": engine.mocte.expert_load(),
        "bytes": engine.mocte.optimizer_bytes(),
        "client": client,
        "random": torch.rand(2).tolist(),
    }


def refuse(settings: dict[str, Any], load: str) -> str:
    """The error that loading ``load`` into a run with other settings gives."""
    from mocte_ds.errors import MocteError

    try:
        run(settings, 0, 0, load, None)
    except MocteError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
