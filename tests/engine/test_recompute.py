"""Activation checkpointing runs every block twice a micro-batch; features, tokens and expert rows count once."""

from typing import Any

import pytest
import torch

from tests.engine import runs
from tests.spawn import spawn

STEPS, EMERGES, TURNS = 5, 2, 2


def run(recompute: bool, block: dict[str, Any]) -> dict[str, Any]:
    """A run with one block in warm-up and one whose experts emerge; what it sampled and counted, on this rank."""
    import mocte_ds
    from mocte_ds.models import Decoder, DecoderConfig

    torch.manual_seed(0)
    sizes = DecoderConfig("llama", runs.VOCAB, 32, 48, 2, 2, max_positions=runs.LENGTH)
    # The only check would come after the end, so that the samples are still there to be looked at.
    settings = runs.config(
        total_steps=STEPS + 1,
        check_every=1.0,
        spectrum={"rank": 4, "rows": 512, "documents": 64, "doublings": 1},
        freeze={"policy": "trainability", "rows": 32},
        **block,
    )
    del settings["scheduler"]
    model = Decoder(sizes if not recompute else DecoderConfig(**{**sizes.__dict__, "activation_checkpointing": True}))
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    blocks = [handle.block for handle in engine.mocte.blocks]
    calls: list[str] = []
    for b in blocks:
        b.register_forward_pre_hook(lambda module, _: calls.append(module.name) if module.training else None)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(STEPS):
        if step == EMERGES:
            engine.mocte.emerge(1)
        for turn in range(TURNS):
            ids, domain = runs.batch(step, turn * world + rank)
            engine.mocte.annotate(domain, ["low", "high"])
            loss = engine(ids, ids)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    layers = [bank.deepspeed_moe for bank in blocks[1].banks]
    samples = [(c._tokens, c._documents) for c in engine.mocte.collectors]
    return {
        "calls": len(calls),
        "losses": losses,
        "rows": [r.rows() for pair in samples for r in pair],
        "keys": [r.keys() for pair in samples for r in pair],
        "ids": [torch.cat([t.float()[:, None] if t.dim() == 1 else t for t in c.tokens()], 1) for c in engine.mocte.collectors],
        "routed": [layer.routed for layer in layers],
        "by_source": [layer.by_source for layer in layers],
        "expert_rows": [rows for layer in layers for rows in layer.rows],
        "load": engine.mocte.expert_load(),
        "weights": [p.detach().clone() for p in engine.module.parameters()],
    }
