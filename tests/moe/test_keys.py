"""Routing keys: causal, alike in one pass and token by token, no leaks between documents; banks; learned routers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights, inherit
from mocte_ds.controller.route_observer import RouteObserver
from mocte_ds.errors import ConfigError
from mocte_ds.flops.ledger import gate_flops
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.balance import Balance
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.moe.keys import BUILT_IN, KEYS, PrefixKey, PreviousKey, TypeKey
from mocte_ds.remote_code.configuration_blocks_mocte import KINDS
from mocte_ds.remote_code.gates_mocte import Gate
from mocte_ds.router_config import RouterConfig
from tests.moe.random_keys import randomise_key
from tests.small_models import small_llama

D, E, EOD, V = 8, 4, 0, 64


def prefix_key() -> PrefixKey:
    key = PrefixKey(D, E)
    key.set(torch.randn(E, D), torch.randn(E))
    return key


def packed() -> tuple[torch.Tensor, Tokens]:
    """Features of two sequences of ten tokens, three documents in the first, and what is known of them."""
    ids = torch.randint(1, V, (2, 10))
    ids[0, 3] = ids[0, 7] = EOD
    return torch.randn(20, D), ForwardState(ids, EOD).tokens((2, 10, D))


def test_prefix_is_the_running_mean_of_the_document() -> None:
    key, (features, tokens) = prefix_key(), packed()
    found = key.logits(features, tokens).view(2, 10, E)
    for row, (start, end) in [(0, (0, 4)), (0, (4, 8)), (0, (8, 10)), (1, (0, 10))]:
        for t in range(start, end):
            mean = features.view(2, 10, D)[row, start : t + 1].mean(0)
            expected = key.cluster_weight @ mean + key.cluster_bias
            torch.testing.assert_close(found[row, t], expected, atol=1e-5, rtol=1e-5)


def test_prefix_knows_neither_the_future_nor_other_documents() -> None:
    key, (features, tokens) = prefix_key(), packed()
    before = key.logits(features, tokens).view(2, 10, E)
    later = features.clone().view(2, 10, D)
    later[:, 6:] += 100
    after = key.logits(later.view(20, D), tokens).view(2, 10, E)
    assert torch.equal(before[:, :6], after[:, :6])
    other = features.clone().view(2, 10, D)
    other[0, :4] += 100
    after = key.logits(other.view(20, D), tokens).view(2, 10, E)
    # The end token at place 3 belongs to the first document.
    torch.testing.assert_close(before[0, 4:], after[0, 4:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[0, :4], after[0, :4])


@pytest.mark.parametrize("kind", ["prefix", "document", "previous", "token", "type", "pair", "pair-hash"])
def test_generation_with_a_cache_routes_like_one_pass(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).eval()
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": {"kind": kind}, "eod_id": EOD})
    blocks = attach(model, config)
    for block in blocks:
        randomise_key(block.banks[0].gate.key)
        for expert in block.banks[0].local_experts:
            for parameter in expert.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        block.mode = BlockMode.SPECIALISING
    layers = [block.banks[0].deepspeed_moe for block in blocks]
    ids = torch.randint(1, V, (3, 12))
    ids[0, 4], ids[1, 6] = EOD, EOD  # one document ends inside the prompt, one with its last token
    look = RouteObserver()
    with torch.no_grad(), blocks[0].context.watched_by(look):
        whole = model(input_ids=ids, use_cache=False).logits
        expected = [look.routes[layer].view(3, 12) for layer in layers]
        output = model(input_ids=ids[:, :7], use_cache=True)
        logits, routed = [output.logits], [[look.routes[layer].view(3, 7)] for layer in layers]
        for t in range(7, 12):
            output = model(input_ids=ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
            for parts, layer in zip(routed, layers, strict=True):
                parts.append(look.routes[layer].view(3, 1))
    for parts, whole_pass in zip(routed, expected, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), whole_pass)
        assert len(whole_pass.unique()) > 1
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_previous_key_reads_the_token_before_in_the_same_document() -> None:
    key = PreviousKey(D, E, V)
    key.set(torch.arange(V) % E)
    ids = torch.tensor([[5, 7, EOD, 9, 10]])
    index = key.choose(torch.zeros(5, D), ForwardState(ids, EOD).tokens((1, 5, D)))
    # 5 has none before it, 9 begins a document: they count themselves.
    assert index.tolist() == [5 % E, 5 % E, 7 % E, 9 % E, 9 % E]


@pytest.mark.parametrize("kind", ["token", "type", "random"])
def test_a_learned_router_starts_as_its_prior_and_gets_a_gradient(kind: str) -> None:
    gate = ClusterGate(D, E, RouterConfig(kind, weight="softmax", learn=True), V)
    features, ids = torch.randn(50, D, requires_grad=True), torch.randint(V, (50,))
    if kind != "type":
        gate.key.set(5 * torch.randn(E, D), torch.zeros(E))
    else:
        gate.key.set(torch.randint(E, (V,)))
    chosen, weight, loss = gate(features, Tokens(ids))
    index = chosen[:, 0]
    assert torch.equal(index, gate.key.choose(features.detach(), Tokens(ids)))
    (weight.sum() + loss).backward()
    assert gate.cluster_residual.grad.abs().sum() > 0
    assert bool(features.grad.any()) is (kind == "random"), "sharp logits of clusters give the features no gradient"
    probability = gate.key.logits(features.detach(), Tokens(ids)).softmax(1)
    torch.testing.assert_close(loss.detach(), torch.tensor(0.01))  # loads are even at birth
    share, counted = torch.rand(E), torch.rand(50) < 0.5
    balanced = gate(features, Tokens(ids), Balance(share, counted))[2]
    torch.testing.assert_close(balanced, 0.01 * E * (share * probability[counted].mean(0)).sum())
    half = gate(features, Tokens(ids), Balance(share, counted, usual_tokens=80.0))[2]
    torch.testing.assert_close(half, 0.01 * E * (share * probability[counted].sum(0) / 80).sum())
    with torch.no_grad():
        gate.cluster_residual.copy_(10 * torch.randn(E, D))
    moved = gate(features, Tokens(ids))[0][:, 0]
    assert not torch.equal(moved, index)
    if kind != "type":
        merged, bias = gate.linear()
        assert torch.equal((features @ merged.T + bias).argmax(1), moved)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, use_cache=False, **sizes)).eval()


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, use_cache=False, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", ["prefix", "document", "previous", "pair", "pair-hash"])
def test_generate_of_transformers_hands_the_cache_over(kind: str) -> None:
    model = llama()
    blocks = attach(model, MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": {"kind": kind}}))
    for block in blocks:
        randomise_key(block.banks[0].gate.key)
        for parameter in block.banks[0].local_experts.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        block.mode = BlockMode.SPECIALISING
    ids = torch.randint(V, (3, 8))
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    with_cache, without = (model.generate(ids, use_cache=flag, **how) for flag in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("make", "pattern"), [(llama, "model.layers.*.mlp"), (gpt2, "transformer.h.*.mlp")])
def test_banks_keep_the_function_and_slice_the_moments(make, pattern: str, count: int) -> None:
    model = make()
    ids = torch.randint(V, (2, 12))
    before = model(input_ids=ids).logits
    kinds = ["token", "previous", "hash"][:count]
    banks = [{"kind": kind} for kind in kinds]
    blocks = attach(model, MocteConfig.from_dict({"modules": pattern, "num_experts": E, "banks": banks}))
    dense = {name: p for name, p in blocks[0].dense.named_parameters()}
    with torch.no_grad():
        dense[next(iter(dense))].add_(0.1)  # trained on since the slots were made
    before = model(input_ids=ids).logits
    for block in blocks:
        copy_dense_weights(block)
        for bank in block.banks:
            if bank.gate.router.kind == "token":
                bank.gate.key.set(torch.randn(E, 32), torch.zeros(E))
            else:
                bank.gate.key.set(torch.randint(E, (V,)))
        block.mode = BlockMode.SPECIALISING
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    block = blocks[0]
    assert block.num_experts == count * E
    each = sum(p.numel() for p in block.banks[0].local_experts[0].parameters())
    assert each < 1.1 * sum(p.numel() for p in dense.values()) / count + 33
    # Moments: a state in which every entry is the parameter itself must come out as the experts' own weights.
    state = {p: {"master": p.detach().clone(), "step": torch.tensor(3.0)} for p in dense.values()}
    for parameter, values in inherit(block, state).items():
        assert torch.equal(values["master"], parameter) and values["step"] == 3
    assert isinstance(block, Block)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"banks": [{"kind": "hash"}] * 5}, "5 mocte.banks do not divide the 48 hidden units"),
        ({"banks": []}, "a router for each bank, at least one"),
        ({"banks": [{"kind": "hash"}], "router": {"kind": "token"}}, "leave mocte.router out"),
        ({"banks": [{"kind": "hush"}]}, r"mocte.banks\[0\].kind = 'hush' is not one of.*'hash'"),
        ({"router": {"learn": True}}, "learn needs weight 'softmax'"),
        ({"router": {"kind": "previous", "weight": "softmax"}}, "needs logits"),
        ({"banks": [{"kind": "token"}, {"kind": "token", "learn": True}]}, r"mocte.banks\[1\].learn needs"),
        ({"router": {"kind": "type", "rows": 64}}, "rows = 64 is for the kinds 'pair'"),
        ({"router": {"aux": -1}}, "aux = -1.0 must not be negative"),
    ],
)
def test_refusals(block: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(llama(), MocteConfig.from_dict({"modules": "model.layers.*.mlp", **block}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_loss_for_even_loads_keeps_its_gradient(reentrant: bool) -> None:
    router = {"kind": "token", "weight": "softmax", "learn": True}
    config = MocteConfig.from_dict({"modules": "model.layers.0.mlp", "num_experts": E, "router": router})
    (block,) = attach(llama().train(), config)
    block.mode = BlockMode.SPECIALISING
    gate = block.banks[0].gate
    gate.key.set(torch.randn(E, 32), torch.zeros(E))
    gate.cluster_residual.requires_grad_()
    share = block.banks[0].loads.share = torch.rand(E)
    x = torch.randn(2, 12, 32, requires_grad=True)
    logits = x.detach().view(24, 32) @ (gate.key.cluster_weight + gate.cluster_residual).T
    expected = 0.01 * E * (share * logits.softmax(1).mean(0)).sum()
    (plain,) = torch.autograd.grad(expected, gate.cluster_residual)
    output = checkpoint(block, x, use_reentrant=reentrant)
    torch.testing.assert_close(block.auxiliary_loss(), expected)
    (output.mean() * 0).backward()
    assert plain.any() and block.auxiliary_loss() is None, "it is brought in once"
    torch.testing.assert_close(gate.cluster_residual.grad, plain)
    gate.cluster_residual.requires_grad_(False)  # a block whose experts are all frozen
    output = checkpoint(block, x, use_reentrant=reentrant)
    assert block.auxiliary_loss() is not None


@KEYS.register("older")
class OlderKey(TypeKey):
    """As somebody wrote it before tables had settings."""

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, vocab_size)

    @classmethod
    def flops(cls, hidden_size: int, num_experts: int) -> float:
        return 7.0


def test_a_table_that_takes_no_settings_still_works() -> None:
    for router in ({"kind": "older"}, {"kind": "older", "weight": "softmax", "learn": True}):
        config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": router})
        (block,) = attach(small_llama(V, 32, 24, 1), config)
        assert block.banks[0].gate.key.prior == 4.0
        sizes: Any = SimpleNamespace(hidden_size=32)
        assert gate_flops(sizes, config, 10).forward == (2 * E * 32 * 10 if "learn" in router else 70)
    with pytest.raises(ConfigError, match="prior, learn_prior and groups are for a table"):
        MocteConfig.from_dict({"modules": "m", "router": {**router, "prior": 1.0}})


def test_the_config_of_an_exported_model_knows_every_key() -> None:
    """It is read without torch, and so has the names once more."""
    assert KINDS == tuple(BUILT_IN)


def test_buffers_in_parts_of_a_key_keep_their_precision() -> None:
    """Of a key of the user's own, which may be made of modules."""

    class Nested(TypeKey):
        def __init__(self) -> None:
            super().__init__(4, 2, 8)
            self.part = torch.nn.Module()
            self.part.register_buffer("edges", 1 + torch.arange(4) / 2048)

    gate = Gate(Nested(), RouterConfig(kind="type"))
    edges = gate.key.part.edges.clone()
    gate.bfloat16()
    assert gate.key.part.edges.dtype == torch.float32 and torch.equal(gate.key.part.edges, edges)
