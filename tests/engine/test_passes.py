"""The place of a pass in the run, and what it counts, do not depend on how a loop splits and steps."""

import logging
from typing import Any

import torch

from tests.spawn import spawn

V, T, GLOBAL, STEPS, EMERGES = 64, 16, 8, 4, 2
LEARNED = {"kind": "random", "weight": "softmax", "learn": True, "aux": 0.5}


def batch(step: int, ragged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch, (8, 16) ids and mask; a sequence is padded on its right."""
    generator = torch.Generator().manual_seed(step)
    ids, mask = torch.randint(1, V, (GLOBAL, T), generator=generator), torch.ones(GLOBAL, T, dtype=torch.long)
    if ragged:
        length = torch.randint(4, T + 1, (GLOBAL,), generator=generator)
        mask = (torch.arange(T) < length[:, None]).long()
    return ids * mask, mask


def run(how: str, micro: int, router: dict[str, Any], ragged: bool = False, stage: int = 1) -> dict[str, Any]:
    """Four steps, experts from the third on; what this rank has sampled and all ranks have counted."""
    from deepspeed.utils import logger
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds

    logger.setLevel(logging.ERROR)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    turns = GLOBAL // world // micro
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, use_cache=False, attn_implementation="eager", **sizes))
    block = {"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2, "auto": False, "total_steps": 100}
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": turns,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "mocte": {**block, "router": router, "spectrum": {"rows": 64, "documents": 16, "doublings": 0}},
    }
    engine, *_ = mocte_ds.initialize(model=model, config=config)

    def backward(part: int) -> None:
        first = (part * world + rank) * micro
        ids, known = (t[first : first + micro] for t in (ids_, mask))
        engine.mocte.annotate(torch.arange(first, first + micro) % 2, ["even", "odd"])
        logits = engine(input_ids=ids, attention_mask=known).logits
        if how == "pair":  # the other answers, which are the same sequences backwards
            engine.mocte.annotate(torch.arange(first, first + micro) % 2, ["even", "odd"])
            other = engine(input_ids=ids.flip(1), attention_mask=known.flip(1)).logits
            logits = logits + 0.5 * other.flip(1)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        # Divided by what every split has in common.
        engine.backward((losses * known).sum() / (micro * T))

    keys = None
    for step in range(STEPS):
        ids_, mask = batch(step, ragged)
        if step == EMERGES:
            keys = engine.mocte.run.samples.collectors[0]._tokens.merged_keys(engine.mesh.data)
            rows = engine.mocte.run.samples.collectors[1].tokens()
            for number in range(2):
                engine.mocte.emerge(block=number)
        if how in ("plain", "pair"):
            for part in range(turns):
                backward(part)
                engine.step()
        elif how == "no_sync":
            with engine.no_sync():
                for part in range(turns - 1):
                    backward(part)
            engine.set_gradient_accumulation_boundary(True)
            backward(turns - 1)
            engine.step()
        elif how == "boundaries":
            for part in range(turns):
                engine.set_gradient_accumulation_boundary(part == turns - 1)
                backward(part)
                engine.step()
        else:  # as accelerate does it
            for part in range(turns):
                engine.set_gradient_accumulation_boundary(part == turns - 1)
                backward(part)
            engine.step()
    result = {
        "keys": keys,
        "features": rows[0],
        "ids": rows[1],
        "sources": rows[2],
        "load": engine.mocte.expert_load(),
        "tokens": engine.tokens_seen,
        "sequences": engine.mocte.passes.sequences,
        "shares": [handle.block.banks[0].loads.share for handle in engine.mocte.blocks],
        "weights": {name: p.detach().clone() for name, p in engine.module.named_parameters() if "expert" not in name},
    }
    engine.destroy()
    return result


WAYS = {
    "micro 4 x 1": ("plain", 4),
    "micro 2 x 2": ("plain", 2),
    "no_sync": ("no_sync", 2),
    "boundaries": ("boundaries", 2),
    "one step call": ("one step call", 2),
}
RAGGED = {"micro 4 x 1, padded": ("plain", 4, True), "micro 2 x 2, padded": ("plain", 2, True)}

PAIRS = {"pairs, micro 4 x 1": ("pair", 4), "pairs, micro 2 x 2": ("pair", 2)}


def run_all() -> dict[str, dict[str, Any]]:
    """Every way with a learned router, one after another: starting processes takes longer than a run."""
    results = {name: run(how, micro, LEARNED) for name, (how, micro) in WAYS.items()}
    results |= {name: run(how, micro, LEARNED) for name, (how, micro) in PAIRS.items()}
    return results | {name: run(how, micro, LEARNED, ragged) for name, (how, micro, ragged) in RAGGED.items()}


def test_splits_and_loops_give_one_run() -> None:
    by_rank = spawn(run_all, 2, timeout=240, deepspeed=True)
    for group in (WAYS, PAIRS, RAGGED):
        names, texts = list(group), 2 if group is PAIRS else 1
        real = texts * sum(int(batch(step, group is RAGGED)[1].sum()) for step in range(EMERGES, STEPS))
        first = [results[names[0]] for results in by_rank]
        for name in names:
            found = [results[name] for results in by_rank]
            for rank in found:
                assert [sum(load) for load in rank["load"]] == [real, real], name
                tokens = sum(int(batch(step, group is RAGGED)[1].sum()) for step in range(STEPS))
                assert rank["tokens"] == texts * tokens, name
                assert rank["sequences"] == STEPS * GLOBAL, name
                assert rank["load"] == first[0]["load"], name
                for mine, plain in zip(rank["shares"], first[0]["shares"], strict=True):
                    assert torch.equal(mine, plain) and not torch.allclose(mine, torch.full((4,), 0.25)), name
                for parameter, weight in first[0]["weights"].items():
                    # Adam turns a gradient that is rounding alone into a part of a step of .01; a wrong scale or a
                    # lost token would be steps apart.
                    torch.testing.assert_close(
                        rank["weights"][parameter], weight, rtol=1e-4, atol=2e-4, msg=f"{name}: {parameter}"
                    )
            # Together the ranks have the same sample, whichever of them has which row.
            orders = [torch.cat([rank["keys"] for rank in parts]).argsort() for parts in (first, found)]
            for fact in ("keys", "ids", "sources", "features"):
                expected, mine = (
                    torch.cat([rank[fact] for rank in parts])[order]
                    for parts, order in zip((first, found), orders, strict=True)
                )
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4, msg=f"{name}: {fact}")
            assert set(torch.cat([rank["sources"] for rank in found]).tolist()) == {0, 1}
            assert len(orders[1].unique()) >= 32
