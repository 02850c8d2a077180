"""Experts without tokens and frozen experts, on two ranks: nothing is decided of them, and nobody waits."""

import json
from typing import Any

import pytest
import torch

from tests.engine import runs
from tests.spawn import spawn

BUSY = 3


def run_with_one_busy_expert(policy: str) -> dict[str, Any]:
    """All tokens of both blocks go to one expert; later it is frozen by hand and thawed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=runs.VOCAB, use_cache=False, **sizes))
    freeze = {"policy": policy, "rows": 32, "iterations": 4, "after_checks": 99}
    # Checks after steps 4, 8, 12; what they say comes after 5, 9, 13.
    settings = runs.config(check_every=0.1, clusters={"deadline": 1.0}, freeze=freeze)
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    events: list[dict] = []
    engine.mocte.on_event(events.append)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values = []
    for step in range(13):
        if step == 1:
            for block in engine.mocte.blocks:
                engine.mocte.emerge(block.index)
                bias = 1e6 * (torch.arange(4) == BUSY)
                block.block.banks[0].gate.key.set(torch.zeros(4, 32), bias.float())
        if step == 6:
            engine.mocte.freeze(0, BUSY)
        if step == 10:
            engine.mocte.thaw(0, BUSY)
        for turn in range(2):
            ids, domain = runs.batch(step, turn * world + rank)
            engine.mocte.annotate(domain, ["low", "high"])
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
        values.append([[expert.trainability for expert in block.experts] for block in engine.mocte.blocks])
    return {"events": json.loads(json.dumps(events)), "values": values}


@pytest.mark.parametrize("policy", ["trainability", "progress"])
def test_only_experts_with_tokens_are_measured(policy: str) -> None:
    first, second = spawn(run_with_one_busy_expert, 2, policy, timeout=120, deepspeed=True)
    assert first["values"] == second["values"], "both ranks know the same, wherever an expert lives"
    checks = {event["step"]: event for event in first["events"] if event["event"] == "check"}
    assert set(checks) == {5, 9, 13}
    for step, check in checks.items():
        for block in check["blocks"]:
            rows = [expert["rows"] for expert in block["experts"]]
            frozen = block["block"] == 0 and step == 9
            # `trainability` watches a frozen expert that it may thaw; the others leave it alone.
            watched = not frozen or policy == "trainability"
            # Every rank that holds it measured 32 of its rows; one rank holds it with ep_size 2.
            assert rows == [0, 0, 0, 32 if watched else 0]
            assert [expert["lambda"] is None for expert in block["experts"]] == [True, True, True, False]
            assert block["experts"][BUSY]["mode"] == ("frozen" if frozen else "training")
            assert block["imbalance"] == [pytest.approx(4.0)]
    assert not [event for event in first["events"] if event["event"] == "freeze" and event["reason"] != "called"]
