"""The ledger's formulas against torch's FlopCounterMode, which counts the real products of matrices."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import set_gate
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.flops.ledger import Ledger
from mocte_ds.flops.model_sizes import model_sizes
from mocte_ds.moe import BlockMode, attach
from mocte_ds.moe import rows as moved
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.router_config import RouterConfig
from mocte_ds.training.model import TransformersModel, config_sizes, make_model

MESH = mesh_of_processes()

TOKENS, CONTEXT = 128, 64
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
LLAMA = TransformersModel(hf={"model_type": "llama", **SMALL, "num_key_value_heads": 2})
GPT2 = TransformersModel(
    hf={
        "model_type": "gpt2",
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 96,
        "n_positions": 64,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
)
WARMUP = [{"layer": 0, "mode": "warmup", "experts": ["dormant"] * 4, "load": [0] * 4}] * 2


def bf16(config: TransformersModel) -> Any:
    """The model, in the type whose attention on a CPU is products of matrices that torch counts."""
    return make_model(config).to(torch.bfloat16)


def counted(model: nn.Module, backward: bool) -> int:
    """As torch counts, but for the angles of rotary positions, which are a product with one number."""
    ids = torch.randint(96, (TOKENS // CONTEXT, CONTEXT), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, depth=None) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
    angles = [sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_dense_step(config: TransformersModel) -> None:
    model, ledger = bf16(config), Ledger()
    ledger.step(config_sizes(config), TOKENS, CONTEXT, None, [])
    assert ledger.forward == counted(model, backward=False)
    assert ledger.forward + ledger.dgrad + ledger.wgrad == counted(model, backward=True) == ledger.total
    ledger.validate(config_sizes(config), TOKENS, CONTEXT)
    assert ledger.validation == ledger.forward and ledger.total == counted(model, backward=True)


ANY = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "phi3": {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": SMALL,
    "gemma3_text": {**SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("name", ANY)
def test_steps_of_models_of_transformers(name: str) -> None:
    """Within 1 %: torch counts the table of rotary positions too, a product with one number."""
    values = {**ANY[name], "use_cache": False, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values))
    ids, ledger = torch.randint(96, (TOKENS // CONTEXT, CONTEXT)), Ledger()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    sizes = model_sizes(model, list(_ffns(model)))
    ledger.step(sizes, TOKENS, CONTEXT, None, [])
    assert ledger.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    width = 128 if name == "gpt2" else 48
    gated = name in ("llama", "qwen3", "phi3", "gemma3_text")
    assert sizes.layers[0].ffn == (3 if gated else 2) * 32 * width and sizes.layers[0].ffn_width == width
    assert model_sizes(model) == sizes, "found without names, too"


def _ffns(model: nn.Module) -> Iterator[str]:
    return (name for name, _ in model.named_modules() if name.endswith((".mlp", ".fc1")))


def test_what_freezing_saves() -> None:
    model = bf16(LLAMA)
    everything = counted(model, backward=True)
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.requires_grad_(False)
    saved = everything - counted(model, backward=True)
    # A block whose four experts, all frozen, share the tokens costs what the frozen FFN costs, and its gate.
    blocks = [WARMUP[0], {"layer": 1, "mode": "locked", "experts": ["frozen"] * 4, "load": [50, 40, 30, 8]}]
    ledger = Ledger()
    ledger.step(config_sizes(LLAMA), TOKENS, CONTEXT, MocteConfig(modules="model.layers.*.mlp"), blocks)
    assert ledger.wgrad_saved == saved
    assert ledger.forward + ledger.dgrad + ledger.wgrad == everything - saved
    assert ledger.total == everything - saved + ledger.routing + ledger.sampling


def test_one_frozen_expert_saves_its_tokens() -> None:
    blocks = [{"layer": 0, "mode": "specialising", "experts": ["training", "frozen"], "load": [100, 28]}] * 2
    some, none = Ledger(), Ledger()
    config = MocteConfig(modules="x", num_experts=2)
    some.step(config_sizes(LLAMA), TOKENS, CONTEXT, config, blocks)
    none.step(config_sizes(LLAMA), TOKENS, CONTEXT, config, [{**b, "experts": ["training"] * 2} for b in blocks])
    assert some.wgrad_saved == 2 * 28 * (2 * 3 * 32 * 48)
    assert some.total == none.total - some.wgrad_saved


@pytest.mark.parametrize(("config", "layers"), [(LLAMA, 1), (LLAMA, 2), (GPT2, 1)], ids=["one", "two", "tied"])
@pytest.mark.parametrize("locked", [False, True])
def test_what_a_frozen_front_saves(config: TransformersModel, layers: int, locked: bool) -> None:
    model = bf16(config)
    everything = counted(model, backward=True)
    if config is GPT2:
        frozen = [model.transformer.wte, model.transformer.wpe, *model.transformer.h[:layers]]
    else:
        frozen = [model.model.embed_tokens, *model.model.layers[:layers]]
    for module in frozen:
        module.requires_grad_(False)
    rest = counted(model, backward=True)
    block = {"layer": 0, "mode": "locked", "experts": ["frozen"] * 4, "load": [50, 40, 30, 8]} if locked else WARMUP[0]
    blocks = [{**block, "layer": i} for i in range(layers)]
    ledger = Ledger()
    ledger.step(config_sizes(config), TOKENS, CONTEXT, MocteConfig(modules="model.layers.*.mlp"), blocks, layers)
    assert ledger.forward + ledger.dgrad + ledger.wgrad == rest
    assert ledger.prefix_saved + ledger.wgrad_saved == everything - rest
    assert (ledger.wgrad_saved > 0) == locked


def test_gate() -> None:
    gate = ClusterGate(32, 4, RouterConfig(kind="token"), None)
    with FlopCounterMode(display=False) as counter:
        gate(torch.zeros(TOKENS, 32), Tokens())
    ledger, config = Ledger(), MocteConfig(modules="x", num_experts=4, router=RouterConfig(kind="token"))
    ledger.step(
        config_sizes(LLAMA),
        TOKENS,
        CONTEXT,
        config,
        [{"layer": 0, "mode": "specialising", "experts": ["training"] * 4, "load": [32] * 4}],
    )
    assert ledger.routing == counter.get_total_flops()


def test_lora_experts_come_on_top() -> None:
    config = MocteConfig.from_dict({"modules": "x", "num_experts": 4, "expert": {"kind": "lora", "width": 12}})
    blocks = [{"layer": 0, "mode": "specialising", "experts": ["training"] * 4, "load": [32] * 4}] * 2
    dense, lora = Ledger(), Ledger()
    dense.step(config_sizes(LLAMA), TOKENS, CONTEXT, config, WARMUP)
    lora.step(config_sizes(LLAMA), TOKENS, CONTEXT, config, blocks)
    assert lora.forward - dense.forward == 2 * 2 * TOKENS * 3 * 32 * 12


def test_round_trip() -> None:
    ledger = Ledger()
    ledger.step(config_sizes(LLAMA), TOKENS, CONTEXT, None, [])
    other = Ledger()
    other.load(ledger.to_dict())
    assert other == ledger and other.to_dict()["total"] == ledger.total > 0


ROUTERS = {
    "hard": {"kind": "token"},
    "learned": {"kind": "token", "weight": "softmax", "learn": True},
    "chance, learned": {"kind": "random", "weight": "softmax", "learn": True},
    "two of them": {"kind": "random", "weight": "softmax", "learn": True, "top_k": 2, "normalise": True},
    "prefix": {"kind": "prefix"},
    "online": {"kind": "online", "directions": 12},
    "gain": {"kind": "random", "weight": "gain", "learn": True},
    "previous": {"kind": "previous"},
}
SEED = 1
"""Of weights with which every expert of the tests below has tokens."""
BANKS = {
    "tables": [{"kind": "previous"}, {"kind": "hash"}],
    "clusters": [{"kind": "token"}, {"kind": "prefix"}],
    "learned": [{"kind": "token", "weight": "softmax", "learn": True}, {"kind": "random"}],
}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", ["dense", "warmup", "ffn", "lora"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("locked", [False, True], ids=["", "locked"])
def test_every_kind_of_step(router: str, kind: str, recompute: bool, locked: bool) -> None:
    """One step, forward and backward, and a validation pass; locked: no expert and no router trains any more."""
    if kind in ("dense", "warmup") and (router != "hard" or locked):
        pytest.skip("no router")
    expert = {"kind": "lora", "width": 12} if kind == "lora" else {}
    values = {"modules": "model.layers.*.mlp", "num_experts": 4, "router": ROUTERS[router], "expert": expert}
    hold_step(values, kind, recompute, locked)


@pytest.mark.parametrize("kind", ["ffn", "lora"])
@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_steps_with_banks(banks: str, kind: str, recompute: bool) -> None:
    expert = {"kind": "lora", "width": 12} if kind == "lora" else {}
    hold_step(
        {"modules": "model.layers.*.mlp", "num_experts": 4, "banks": BANKS[banks], "expert": expert}, kind, recompute
    )


def hold_step(values: dict[str, Any], kind: str, recompute: bool = False, locked: bool = False) -> None:
    """Assert that the ledger counts one step and one validation pass as torch does.

    Args:
        values: the "mocte" block.
        kind: `dense`, `warmup` or of the experts.
        recompute: with activation checkpointing.
        locked: no expert and no router trains any more.
    """
    sizes = replace(LLAMA, activation_checkpointing=recompute)
    torch.manual_seed(SEED)
    model = bf16(sizes)
    config = None if kind == "dense" else MocteConfig.from_dict(values)
    blocks = attach(model, config) if config else []
    for block in blocks if kind != "warmup" else []:
        set_gate(block, config, MESH)
        block.mode = BlockMode.SPECIALISING
        block.banks.requires_grad_(not locked)
        block.context.micro_step = 1
    mode = "warmup" if kind == "warmup" else "locked" if locked else "specialising"
    model.train()
    with patch.object(moved, "filled_up", lambda count: max(1, count)):
        found = counted(model, backward=True)
        loads = [[n for bank in block.banks for n in bank.loads.total.tolist()] for block in blocks]
        model.eval()
        forward = counted(model, backward=False)
    # One without tokens would run on a row of padding, which the ledger leaves out.
    assert kind in ("dense", "warmup") or all(n > 0 for load in loads for n in load), loads
    rows = [
        {"layer": i, "mode": mode, "experts": ["frozen" if locked else "training"] * len(load), "load": load}
        for i, load in enumerate(loads)
    ]
    ledger = Ledger()
    ledger.step(config_sizes(sizes), TOKENS, CONTEXT, config, rows, sampled=False)
    assert ledger.total == found and (ledger.recompute > 0) == recompute
    ledger.validate(config_sizes(sizes), TOKENS, CONTEXT, config, rows)
    assert ledger.validation == forward


def test_recompute_stops_where_the_front_is_frozen() -> None:
    sizes = replace(LLAMA, activation_checkpointing=True)
    whole, front = Ledger(), Ledger()
    whole.step(config_sizes(sizes), TOKENS, CONTEXT, MocteConfig(modules="x"), WARMUP)
    front.step(config_sizes(sizes), TOKENS, CONTEXT, MocteConfig(modules="x"), WARMUP, 1)
    assert front.recompute == whole.recompute / 2


@pytest.mark.parametrize("top_k", [1, 2])
def test_several_experts_a_token(top_k: int) -> None:
    router = {"kind": "random", "weight": "softmax", "top_k": top_k}
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": 4, "router": router})
    model = bf16(LLAMA)
    for block in attach(model, config):
        set_gate(block, config, MESH)
        block.mode = BlockMode.SPECIALISING
        for parameter in block.banks.parameters():
            parameter.requires_grad_(True)
    # Rows are padded on a CPU; the ledger counts tokens.
    with patch.object(moved, "filled_up", lambda count: max(1, count)):
        found = counted(model, backward=True)
    load = [TOKENS * top_k // 4] * 4
    blocks = [{"layer": i, "mode": "specialising", "experts": ["training"] * 4, "load": load} for i in range(2)]
    ledger = Ledger()
    ledger.step(config_sizes(LLAMA), TOKENS, CONTEXT, config, blocks)
    assert ledger.forward + ledger.dgrad + ledger.wgrad + ledger.routing == found
