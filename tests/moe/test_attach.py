"""Blocks in transformers' models: the function does not change when they are put in, nor when experts emerge."""

import copy
from pathlib import Path

import pytest
import torch
from deepspeed.moe.layer import MoE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mocte_ds.checkpoints.source import with_blocks
from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.forward import ForwardState, documents_of

IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, use_cache=False
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config).eval()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=32, use_cache=False, **sizes)).eval()


@pytest.mark.parametrize("kind", ["ffn", "lora"])
@pytest.mark.parametrize(
    ("make", "pattern"),
    [(llama, "model.layers.*.mlp"), (gpt2, "transformer.h.*.mlp"), (opt, "model.decoder.layers.*.fc1")],
)
def test_function_is_kept(make, pattern, kind):
    model = make()
    before = model(input_ids=IDS).logits
    config = MocteConfig.from_dict(
        {"modules": pattern, "num_experts": 4, "expert": {"kind": kind}, "router": {"kind": "token"}}
    )
    blocks = attach(model, config)
    assert [block.name for block in blocks] == [pattern.replace("*", str(i)) for i in range(3)]
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert sum(isinstance(module, MoE) for module in model.modules()) == 3
    for block in blocks:
        gate = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
        block.banks[0].gate.key.set(gate, torch.zeros(4))
        if kind == "ffn":
            copy_dense_weights(block)
        block.mode = BlockMode.SPECIALISING
    after = model(input_ids=IDS).logits
    assert blocks[0].banks[0].deepspeed_moe.exp_counts.count_nonzero() > 1
    if kind == "lora":
        assert torch.equal(after, before)
    else:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in blocks[1].banks[0].local_experts[2].parameters():
            parameter.add_(0.5)
    assert not torch.allclose(model(input_ids=IDS).logits, before)


def test_lora_width_and_zero_birth():
    config = MocteConfig.from_dict(
        {"modules": "model.layers.1.mlp", "num_experts": 4, "expert": {"kind": "lora", "width": 5}}
    )
    (block,) = attach(llama(), config)
    expert = block.banks[0].local_experts[0]
    assert expert.gate_proj.weight.shape == (5, 32)
    assert not expert.down_proj.weight.any() and expert.up_proj.weight.any()
    default = MocteConfig.from_dict({"modules": "model.layers.1.mlp", "num_experts": 4, "expert": {"kind": "lora"}})
    (block,) = attach(llama(), default)
    assert block.banks[0].local_experts[0].gate_proj.weight.shape == (12, 32)


@pytest.mark.parametrize("kind", ["type", "hash"])
def test_tables_route_by_token_id(kind):
    model = llama()
    config = MocteConfig.from_dict({"modules": "model.layers.0.mlp", "num_experts": 4, "router": {"kind": kind}})
    (block,) = attach(model, config)
    table = torch.randint(4, (64,), generator=torch.Generator().manual_seed(2))
    block.banks[0].gate.key.set(table)
    block.mode = BlockMode.SPECIALISING
    model(input_ids=IDS)
    expected = torch.bincount(table[IDS.reshape(-1)], minlength=4)
    assert torch.equal(block.banks[0].deepspeed_moe.exp_counts, expected)


def test_gate_keeps_its_precision():
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": 4, "router": {"kind": "token"}})
    model = llama()
    block = attach(model, config)[0]
    gate = torch.randn(4, 32)
    block.banks[0].gate.key.set(gate, torch.zeros(4))
    model.to(torch.bfloat16)
    assert block.dense.gate_proj.weight.dtype == torch.bfloat16
    assert torch.equal(block.banks[0].gate.key.cluster_weight, gate)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layer.*.mlp", "matches no module.*model.layers.0.mlp"),
        (["model.layers.*", "model.layers.0.mlp"], "inside of"),
        ("model.layers.0.input_layernorm", "no linear layer"),
    ],
)
def test_wrong_patterns(pattern, message):
    config = MocteConfig.from_dict({"modules": pattern})
    with pytest.raises(ConfigError, match=message):
        attach(llama(), config)


def test_name_that_deepspeed_would_lose():
    model = llama()
    model.expert_mlp = model.model.layers[0].mlp
    with pytest.raises(ConfigError, match="expert"):
        attach(model, MocteConfig.from_dict({"modules": "expert_mlp"}))


FAMILIES = {
    "llama": (llama, "model.layers.{}.mlp"),
    "gpt2": (gpt2, "transformer.h.{}.mlp"),
    "phi3": ({"pad_token_id": 0}, "model.layers.{}.mlp"),
    "gpt_neox": ({}, "gpt_neox.layers.{}.mlp"),
    "gemma3_text": ({"num_key_value_heads": 1, "head_dim": 16}, "model.layers.{}.mlp"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers.{}.fc1"),
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 3, "n_head": 2, "multi_query": True}, "transformer.h.{}.mlp"),
}
"""GPTBigCode's attention has matrices of the shapes of a fused FFN, but is none."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_ffn_is_found(name, caplog):
    made, path = FAMILIES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {} if name == "gpt_bigcode" else sizes
    values = {} if callable(made) else {"vocab_size": 64, **sizes, **made}
    model = made() if callable(made) else AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values))
    with caplog.at_level("WARNING", "mocte_ds"):
        blocks = attach(model, MocteConfig.from_dict({"modules": "auto"}))
    assert [block.name for block in blocks] == [path.format(i) for i in range(3)]
    assert f"mocte.modules = 'auto': blocks at {path.format('*')} (3)." in caplog.messages


def test_an_ffn_that_reads_something_else_is_refused():
    values = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **values))
    with pytest.raises(ConfigError, match=r"h.0.mlp \(BloomMLP\), whose forward needs hidden_states, residual"):
        attach(model, MocteConfig.from_dict({"modules": "transformer.h.*.mlp"}))


def test_documents_of_a_packed_batch():
    model = llama()
    (block,) = attach(model, MocteConfig.from_dict({"modules": "model.layers.0.mlp"}))
    assert isinstance(block, Block)
    ids = torch.tensor([[5, 0, 7, 8, 0], [1, 2, 3, 4, 5]])
    shape, states = (2, 5, 1), []
    block.register_forward_pre_hook(lambda *_: states.append(block.context.current()))
    model(input_ids=ids)
    assert torch.equal(states[0].ids, ids)
    found = [documents_of(ForwardState(ids, end).tokens(shape), None, ids.device).tolist() for end in (0, None)]
    assert found == [[[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]], [[0] * 5, [1] * 5]]


def test_a_checkpoint_of_an_auto_run_has_the_blocks_that_the_run_found() -> None:
    """Attention with two heads and one key has matrices of an FFN's shape, which only their weights tell apart."""
    sizes = {"n_embd": 16, "n_inner": 40, "n_layer": 2, "n_head": 2, "n_positions": 16}
    made = GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=20, **sizes))
    config = {"modules": "auto", "num_experts": 2}
    names = [block.name for block in attach(copy.deepcopy(made), MocteConfig.from_dict(config))]
    assert names == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    state = {"config": config, "blocks": [{"name": name, "mode": "warmup"} for name in names]}
    stored = with_blocks(made.to("meta"), state, Path())
    assert [module.name for module in stored.modules() if isinstance(module, Block)] == names
    for damaged in ([], [{"mode": "warmup"}], [{"name": "transformer.h.*.mlp", "mode": "warmup"}]):
        with pytest.raises(CheckpointError, match="lists the blocks"):
            with_blocks(copy.deepcopy(made), {"config": config, "blocks": damaged}, Path("there"))
