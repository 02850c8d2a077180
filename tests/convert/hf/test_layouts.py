"""Every stock class computes what the trained model computes; what no class can is refused, with what to change."""

import re

import torch
from pytest import approx, mark, raises
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mocte_ds.convert.hf import experts as module
from mocte_ds.convert.hf.compare import compare
from mocte_ds.convert.hf.dense import SpecialIds
from mocte_ds.convert.hf.export import write_model
from mocte_ds.convert.hf.layouts import choose_layout
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe import Block
from tests.checkpoints import tiny
from tests.checkpoints.held import NONE, HeldSource, facts_of, stored

ALL, BACK = "model.layers.*.mlp", ["model.layers.1.mlp", "model.layers.2.mlp"]
OUTER = ["model.layers.0.mlp", "model.layers.2.mlp"]
LORA = {"kind": "lora", "width": 12}

# Name: class, decoder, blocks.
CASES = {
    "mixtral": ("Mixtral", {}, {"modules": ALL}),
    "mixtral, tied": ("Mixtral", {"tie_embeddings": True}, {"modules": ALL}),
    "mixtral, all kv heads": ("Mixtral", {"num_kv_heads": 4}, {"modules": ALL}),
    "mixtral, a width of no 16 bytes": ("Mixtral", {"intermediate_size": 45}, {"modules": ALL}),
    "qwen2moe, some layers": ("Qwen2Moe", {}, {"modules": OUTER}),
    "qwen2moe, softmax": ("Qwen2Moe", {}, {"modules": ALL, "router": {"bias": False, "weight": "softmax"}}),
    "qwen2moe, softmax, some layers, tied": (
        "Qwen2Moe",
        {"tie_embeddings": True},
        {"modules": BACK, "router": {"bias": False, "weight": "softmax"}},
    ),
    "qwen2moe, a width of no 16 bytes": ("Qwen2Moe", {"intermediate_size": 45}, {"modules": OUTER}),
    "qwen2moe, a block in warm-up": ("Qwen2Moe", {}, {"modules": ALL, "warmup": (1,)}),
    "qwen2moe, softmax, a block in warm-up": (
        "Qwen2Moe",
        {},
        {"modules": ALL, "warmup": (0,), "router": {"bias": False, "weight": "softmax"}},
    ),
    # Random directions have no bias, whatever router.bias says.
    "mixtral, random": ("Mixtral", {}, {"modules": ALL, "router": {"kind": "random"}}),
    "qwen2moe, random, learned": (
        "Qwen2Moe",
        {},
        {"modules": ALL, "router": {"kind": "random", "weight": "softmax", "learn": True}},
    ),
    "glm4moe, random": ("Glm4Moe", {}, {"modules": BACK, "expert": LORA, "router": {"kind": "random"}}),
    "glm4moe": ("Glm4Moe", {}, {"modules": BACK, "expert": LORA}),
    "glm4moe, all layers, tied": ("Glm4Moe", {"tie_embeddings": True}, {"modules": ALL, "expert": LORA}),
    "glm4moe, a width that divides nothing": (
        "Glm4Moe",
        {},
        {"modules": BACK, "expert": {"kind": "lora", "width": 20}},
    ),
    "glm4moe, wider than the FFN": ("Glm4Moe", {}, {"modules": BACK, "expert": {"kind": "lora", "width": 50}}),
    "glm4moe, warm-up in front": ("Glm4Moe", {}, {"modules": ALL, "warmup": (0,), "expert": LORA}),
    "glm4moe, warm-up behind": ("Glm4Moe", {}, {"modules": ALL, "warmup": (1,), "expert": LORA}),
    "llama": ("Llama", {}, None),
    "llama, tied": ("Llama", {"tie_embeddings": True}, None),
    "llama, all in warm-up": ("Llama", {}, {"modules": ALL, "warmup": (0, 1, 2), "router": {"kind": "type"}}),
    "llama, lora in warm-up": ("Llama", {}, {"modules": BACK, "warmup": (0, 1), "expert": LORA}),
    "gpt2": ("GPT2LMHead", {"style": "gpt2"}, None),
    "gpt2, all in warm-up": ("GPT2LMHead", {"style": "gpt2"}, {"modules": ALL, "warmup": (0, 1, 2)}),
}


def build(name: str) -> tuple[torch.nn.Module, str]:
    """The model of a case and its class."""
    stock, decoder, blocks = CASES[name]
    model = tiny.decoder(**decoder)
    if blocks:
        tiny.add_blocks(model, **{"router": {"bias": False}, **blocks})
    return model, "GPT2LMHeadModel" if stock.startswith("GPT2") else f"{stock}ForCausalLM"


def names(folder) -> dict[str, tuple]:
    """Shapes and numbers in a file, by name."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  no mapping
        return {key: (found.get_shape(), found.get_dtype()) for key, found in slices.items()}


@mark.parametrize("name", CASES)
def test_logits_and_generation_are_the_trained_models(name, tmp_path):
    model, stock = build(name)
    source = HeldSource(model)
    layout = choose_layout(source, NONE)
    parameters = write_model(source, layout, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert layout.name == type(found).__name__ == stock
    assert parameters == sum(parameter.numel() for parameter in found.parameters())
    with torch.no_grad():
        expected, logits = model(tiny.ids(5)), found(input_ids=tiny.ids(5)).logits
    largest = expected.abs().max().item()
    assert (logits - expected).abs().max().item() < 1e-5 * largest
    prompt = tiny.ids(6, batch=2, length=5)
    generated = found.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(generated, tiny.greedy(model, prompt, 20))
    facts, checksums = compare(source, layout, tmp_path)
    assert facts["logit_difference"] < 1e-5 and facts["changed_predictions"] == 0
    assert facts["tensors_compared"] == len(checksums) == len(layout.stored)
    # The files are those that the class itself would write.
    found.save_pretrained(tmp_path / "by transformers")
    assert names(tmp_path) == names(tmp_path / "by transformers")
    # The control: had two experts changed places, these ids would have shown it.
    counts = tiny.tokens_of_experts(model, tiny.ids(5))
    assert all(min(tokens) > 0 for tokens in counts.values())
    assert facts["experts_compared"] == tiny.EXPERTS * len(layout.blocks) >= tiny.EXPERTS * len(counts)
    for block in layout.blocks.values():
        if block.name in counts:
            gate = block.banks[0].gate
            gate.key.cluster_weight.copy_(gate.key.cluster_weight[[1, 0, 2, 3]])
            with torch.no_grad():
                assert (model(tiny.ids(5)) - logits).abs().max().item() > 1e-2 * largest


@mark.parametrize("name", ["mixtral", "qwen2moe, softmax", "glm4moe", "mixtral, a width of no 16 bytes"])
def test_bf16_keeps_the_router(name, tmp_path):
    model, _ = build(name)
    exact = {
        block.name: block.banks[0].gate.key.cluster_weight.clone() for block in model.modules() if type(block) is Block
    }
    source, layout = stored(model, tmp_path, "bf16")
    model.to(torch.bfloat16).float()
    kinds = {key: kind for key, (_, kind) in names(tmp_path).items()}
    routers = {key for key in kinds if ".gate." in key}
    assert len(routers) >= len(exact)
    assert {kinds[key] for key in routers} == {"F32"} and {kinds[key] for key in kinds.keys() - routers} == {"BF16"}
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = model(tiny.ids(5)), wide(input_ids=tiny.ids(5)).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for block_name, gate in exact.items():
        kept = wide.get_submodule(block_name).gate.weight
        scale = kept.norm() / gate.norm()
        assert torch.equal(kept, gate * 2.0 ** torch.log2(scale).round())
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert narrow.dtype is torch.bfloat16
    facts, _ = compare(source, layout, tmp_path)
    assert facts["logit_difference"] < 1e-5 and 0 <= facts["changed_predictions"] < 0.5


def test_a_loud_gate_does_not_saturate_the_sigmoid(tmp_path, monkeypatch):
    model, _ = build("glm4moe")
    for layer in model.model.layers[1:]:
        layer.post_attention_layernorm.weight.data *= 30
        layer.mlp.banks[0].gate.key.cluster_weight *= 50
    facts_of(model, tmp_path / "good")
    monkeypatch.setattr(module, "sigmoid_scale", lambda *_: 1.0)
    with raises(CheckpointError, match="differ from the trained"):
        facts_of(model, tmp_path / "saturated")


def test_a_bias_that_changes_no_choice_is_exported(tmp_path):
    model = tiny.decoder()
    for block in tiny.add_blocks(model, ALL, router={"weight": "softmax"}):
        weight, bias = tiny.cluster_gate(1)
        block.banks[0].gate.key.set(weight, bias + 3.5)
    assert facts_of(model, tmp_path, "stock")["logit_difference"] < 1e-5


def test_special_tokens_are_in_the_config(tmp_path):
    for name in ("mixtral", "qwen2moe, softmax", "glm4moe", "llama", "gpt2"):
        stored(build(name)[0], tmp_path / name, special=SpecialIds(7, 8, 9))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for config in (model.config, model.generation_config):
            assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 8, 9)


def refusal(model: torch.nn.Module) -> str:
    """The message that says why a model is not a stock class; the own class takes it, and remembers why."""
    source = HeldSource(model)
    with raises(CheckpointError) as caught:
        choose_layout(source, NONE, "stock")
    own = choose_layout(source, NONE)
    assert (own.name, own.reason) == ("MocteForCausalLM", str(caught.value))
    return str(caught.value)


@mark.parametrize(
    ("blocks", "message"),
    [
        ({"modules": ALL, "router": {"kind": "type"}}, "router.kind 'type'.*train with router.kind 'token'"),
        ({"modules": ALL, "router": {"kind": "hash"}}, "router.kind 'hash'"),
        ({"modules": ALL, "router": {"bias": True}}, "model.layers.0.mlp has one.*router.bias false"),
        ({"modules": OUTER, "expert": LORA}, "name all layers from 0 on"),
        ({"modules": BACK, "expert": LORA, "router": {"bias": False, "weight": "softmax"}}, "router.weight 'hard'"),
        ({"modules": ALL, "banks": [{"kind": "token"}, {"kind": "hash"}]}, "model.layers.0.mlp has 2 banks"),
    ],
)
def test_what_no_stock_class_computes_becomes_the_own_class(blocks, message):
    model = tiny.decoder()
    default = {} if "banks" in blocks else {"router": {"bias": False}}
    tiny.add_blocks(model, **{**default, **blocks})
    assert re.search(message, refusal(model))


def test_experts_of_the_gpt2_style_become_the_own_class():
    model = tiny.decoder("gpt2")
    tiny.add_blocks(model, ALL, router={"bias": False})
    assert "GPT-2 style" in refusal(model)


def test_what_no_class_computes_is_refused():
    model = tiny.decoder()
    tiny.add_blocks(model, "model.layers.1.self_attn.o_proj", router={"bias": False})
    with raises(CheckpointError, match="o_proj is not an FFN of a layer"):
        choose_layout(HeldSource(model), NONE)
    with raises(ConfigError, match="class = 'best' is not one of"):
        choose_layout(HeldSource(tiny.decoder()), NONE, "best")


def test_scale_is_a_power_of_two_and_bounds_the_logits():
    generator = torch.Generator().manual_seed(0)
    for factor in (1e-6, 1.0, 3e7):
        gate, norm = factor * torch.randn(4, 32, generator=generator), torch.rand(32, generator=generator) * 9
        scale = module.sigmoid_scale(gate, norm)
        unit = torch.randn(1000, 32, generator=generator)
        features = unit / unit.square().mean(1, keepdim=True).sqrt() * norm
        largest = (features @ (gate * scale).T).abs().max().item()
        assert torch.log2(torch.tensor(scale)).item() == approx(round(torch.log2(torch.tensor(scale)).item()))
        assert 0.1 < largest <= 1
    assert module.sigmoid_scale(torch.zeros(4, 32), torch.ones(32)) == 1
