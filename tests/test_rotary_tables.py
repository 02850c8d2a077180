"""Rotary tables stay exact when a model is rounded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mocte_ds.rotary_tables import kept_in_fp32


def test_tables_are_as_before_and_weights_are_rounded() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    saved = set(model.state_dict())
    with kept_in_fp32(model):
        model.bfloat16()
        assert not torch.equal(
            dict(model.named_buffers())["model.rotary_emb.inv_freq"].float(), next(iter(before.values()))
        )
    after = dict(model.named_buffers())
    assert before and all(torch.equal(after[name], table) for name, table in before.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert set(model.state_dict()) == saved
