"""Gradient conflict of experts that read rows of another rank: the numbers of one process that has everything."""

import pytest
import torch

from tests.engine import runs
from tests.spawn import spawn


def conflict_after_emergence(ep_size: int) -> dict[int, dict[int, dict[str, float]]]:
    """Both blocks with experts that differ, and a probe set of nine sequences (so one rank keeps one more)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds
    from mocte_ds.controller.gradients import read_conflict

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=runs.VOCAB, use_cache=False, **sizes))
    settings = runs.config(ep_size=ep_size, freeze={"policy": "trainability", "rows": 32}, probe_tokens=10**6)
    del settings["bf16"]
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    sequences = [runs.batch(0, part) for part in (0, 1)]
    ids, domain = torch.cat([s[0] for s in sequences])[:9], torch.cat([s[1] for s in sequences])[:9]
    engine.mocte.set_probe(ids, domain)
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(3)))[0]
    for handle in engine.mocte.blocks:
        engine.mocte.emerge(handle.index)
        bank = handle.block.banks[0]
        generator = torch.Generator().manual_seed(handle.index)
        bank.gate.key.set(torch.randn(4, 32, generator=generator), torch.zeros(4))
        first = bank.first_local(engine.mesh.expert.rank)
        for local, expert in enumerate(bank.local_experts):
            generator.manual_seed(10 * handle.index + first + local)
            with torch.no_grad():
                for p in expert.parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=generator))
        handle.document_mean, handle.document_basis = torch.zeros(32), basis
        handle.document_centroids = torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]])
        handle.document_prices = torch.zeros(4)
    return read_conflict(engine.mocte.run, engine.mocte.progress.probe)


def test_two_ranks_measure_what_one_does() -> None:
    (alone,) = spawn(conflict_after_emergence, 1, 1, timeout=60, deepspeed=True)
    first, second = spawn(conflict_after_emergence, 2, 2, timeout=60, deepspeed=True)
    assert first == second and set(first) == {0, 1}
    compared = 0
    for block, experts in alone.items():
        assert set(experts) == set(first[block])
        for k, numbers in experts.items():
            # Q compares with mixtures that are drawn by the order of the rows, which is another one here.
            drawn = {"Q", "cluster_Q"}
            expected = {name: value for name, value in numbers.items() if name not in drawn}
            found = {name: value for name, value in first[block][k].items() if name not in drawn}
            assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), (block, k)
            compared += "cosine" in numbers and "cluster_R" in numbers
    assert compared > 3, "the test needs experts with several sources and clusters"
