"""One rank's features are not finite: at the check all ranks stop with the same error, which names the layer."""

import math
from typing import Any

import torch

from tests.engine import runs
from tests.spawn import spawn

STEPS = 4


def run(value: float, tokens: slice) -> str:
    """The error that ends a run in which block 1 of rank 1 samples ``value`` in a feature of some tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds
    from mocte_ds.errors import MocteError

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    spectrum = {"rank": 4, "rows": 64, "documents": 128, "doublings": 0}
    settings = runs.config(total_steps=STEPS, check_every=1.0, spectrum=spectrum)
    del settings["scheduler"]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=runs.VOCAB, use_cache=False, **sizes))
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bad, samples = engine.mocte.blocks[1].block, engine.mocte.run.samples
    see = samples.features

    def see_bad(block: Any, hidden: torch.Tensor, state: Any) -> None:
        if block is bad:
            hidden = hidden.clone()
            hidden[0, tokens, 5] = value
        see(block, hidden, state)

    if rank == 1:
        # Only what is sampled: in the model itself the loss would carry it to all ranks at once.
        samples.features = see_bad
    try:
        for step in range(STEPS):
            for turn in range(2):
                ids, _ = runs.batch(step, turn * world + rank)
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
    except MocteError as error:
        return f"step {engine.global_steps}: {error}"
    return "no error"


def run_all() -> list[str]:
    """NaN and infinity, in all tokens of a sequence and in a single one."""
    return [run(value, tokens) for value in (math.nan, math.inf) for tokens in (slice(None), slice(7, 8))]


def test_a_check_refuses_features_that_are_not_finite_on_all_ranks() -> None:
    # A rank that stopped alone would leave the other waiting in a collective, and spawn would say so.
    one, other = spawn(run_all, 2, timeout=120, deepspeed=True)
    assert one == other
    for message in one:
        assert message.startswith(f"step {STEPS}: sampled_svd: rows with NaN or infinity (")
        assert "model.layers.1.mlp: " in message and "model.layers.0" not in message
    # A single token is hardly ever in the sample of tokens, but it spoils the mean of its document.
    assert ["documents" in message for message in one] == [False, True, False, True]
