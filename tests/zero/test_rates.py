"""A unit with a part of the learning rate takes that part of its step, everything else its whole one."""

import torch

from tests.engine import runs
from tests.spawn import spawn


def steps_of_units(factor: float) -> dict[str, list[torch.Tensor]]:
    """How far each unit's weights move in the third step, with one expert slowed down at that step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = runs.config(auto=False, ep_size=1, total_steps=10)
    settings.update(bf16={"enabled": False}, gradient_accumulation_steps=1)
    settings.pop("scheduler")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=runs.VOCAB, use_cache=False, **sizes))
    engine, optimizer, *_ = mocte_ds.initialize(model=model, config=settings)
    moved: dict[str, list[torch.Tensor]] = {}
    for step in range(3):
        if step == 1:
            engine.mocte.emerge(block=0)
        units = engine.mocte.run.registry.units
        before = {name: [p.detach().clone() for p in unit.parameters] for name, unit in units.items()}
        ids, _ = runs.batch(step, 0)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        if step == 2:
            optimizer.rate_factors = {"model.layers.0.mlp.1": factor}
        rates = [group["lr"] for group in optimizer.param_groups]
        engine.step()
        assert [group["lr"] for group in optimizer.param_groups] == rates
        moved = {n: [p.detach() - q for p, q in zip(u.parameters, before[n], strict=True)] for n, u in units.items()}
    return moved


def test_part_of_the_learning_rate() -> None:
    (whole,), (half,), (none,) = (spawn(steps_of_units, 1, f, timeout=90, deepspeed=True) for f in (1.0, 0.5, 0.0))
    assert all(t.abs().sum() > 0 for t in whole["model.layers.0.mlp.1"])
    for name, steps in whole.items():
        slowed = name == "model.layers.0.mlp.1"
        for full, part, still in zip(steps, half[name], none[name], strict=True):
            # Decoupled weight decay is part of the step, so all of it scales.
            torch.testing.assert_close(part, full * (0.5 if slowed else 1.0), rtol=1e-3, atol=1e-7)
            assert torch.equal(still, torch.zeros_like(full) if slowed else full)
