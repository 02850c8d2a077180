"""Activation checkpointing runs every block twice per micro-batch; its features, tokens and expert rows count once."""

from typing import Any

import torch

from tests.engine import runs
from tests.spawn import spawn

STEPS, EMERGES, TURNS = 5, 2, 2
BANKS = [{"kind": "token", "weight": "softmax", "learn": True}, {"kind": "prefix"}]
BLOCKS: dict[str, dict[str, Any]] = {"token": {}, "banks": {"banks": BANKS}}


def run(recompute: bool, block: dict[str, Any]) -> dict[str, Any]:
    """Block 0 stays in warm-up, block 1's experts emerge; what was sampled and counted on this rank."""
    import mocte_ds

    # The only check would come after the end, so that the samples are still there to be looked at.
    settings = runs.config(
        total_steps=STEPS + 1,
        check_every=1.0,
        spectrum={"rank": 4, "rows": 512, "documents": 128, "doublings": 0},
        freeze={"policy": "trainability", "rows": 32},
        **block,
    )
    del settings["scheduler"]
    model = runs.model()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    calls: list[bool] = []
    for handle in engine.mocte.blocks:
        handle.block.register_forward_pre_hook(lambda module, _: calls.append(True) if module.training else None)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(STEPS):
        if step == EMERGES:
            engine.mocte.emerge(1)
        for turn in range(TURNS):
            ids, domain = runs.batch(step, turn * world + rank)
            engine.mocte.annotate(domain, ["low", "high"])
            loss = engine(ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    samples = engine.mocte.run.samples
    collectors = samples.collectors
    layers = [bank.deepspeed_moe for bank in engine.mocte.blocks[1].block.banks]
    return {
        "calls": len(calls),
        "losses": losses,
        "tokens": [tensor for c in collectors for tensor in c.tokens()],  # features, ids and sources
        "documents": [tensor for c in collectors for tensor in c.documents()],
        "hashes": [
            reservoir.merged_keys(engine.mesh.data) for c in collectors for reservoir in (c._tokens, c._documents)
        ],
        "routed": [layer.loads.total for layer in layers],
        "by_source": [samples.by_source[layer] for layer in layers],
        "expert_rows": [rows for layer in layers for rows in samples.rows[layer].state_dict()["rows"]],
        "load": engine.mocte.expert_load(),
        "weights": [parameter.detach().clone() for parameter in engine.module.parameters()],
    }


def run_all() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Every run without and with recomputation, one after another: starting processes takes longer than a run."""
    return {name: (run(False, block), run(True, block)) for name, block in BLOCKS.items()}


def test_a_recomputed_forward_is_not_counted() -> None:
    results = spawn(run_all, 2, timeout=150, deepspeed=True)
    for case, block in BLOCKS.items():
        for result in results:
            plain, recomputed = result[case]
            assert plain.pop("calls") * 2 == recomputed.pop("calls") > 0, "nothing was recomputed"
            for name, values in plain.items():
                # The same trajectory, or equal samples would say nothing; weights include a learned router's.
                for expected, found in zip(values, recomputed[name], strict=True):
                    same = torch.equal(expected, found) if isinstance(expected, torch.Tensor) else expected == found
                    assert same, f"{case}: {name} differs under activation checkpointing"
        # What is counted twice in both runs would be equal, too.
        both = [result[case][1] for result in results]
        tokens = (STEPS - EMERGES) * TURNS * 2 * runs.MICRO * runs.LENGTH
        for number in range(len(block.get("banks", [None]))):
            assert sum(int(rank["routed"][number].sum()) for rank in both) == tokens
            assert sum(int(rank["by_source"][number].sum()) for rank in both) == tokens
        for hashes in zip(*[rank["hashes"] for rank in both], strict=True):
            together = torch.cat(hashes)
            assert len(together.unique()) == len(together) > 90, f"{case}: a row was sampled twice"
