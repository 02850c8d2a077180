"""Every mixture class computes what the trained model computes; what no class can is refused, with what to change."""

import re
from pathlib import Path

import torch
import transformers
from pytest import approx, mark, raises
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mocte_ds.convert.hf.families import FAMILIES, glm4_moe
from mocte_ds.convert.hf.mixture import find_mixture
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe import Block
from tests.checkpoints import tiny
from tests.checkpoints.held import HeldSource, write
from tests.convert.hf.test_import import LLAMA3

ROOT = Path(__file__).resolve().parents[3]
ALL, BACK = "model.layers.*.mlp", ["model.layers.1.mlp", "model.layers.2.mlp"]
OUTER = ["model.layers.0.mlp", "model.layers.2.mlp"]
LORA = {"kind": "lora", "width": 12}

# Name: class, decoder, blocks.
CASES = {
    "mixtral": ("Mixtral", {}, {"modules": ALL}),
    "mixtral, tied": ("Mixtral", {"tie_word_embeddings": True}, {"modules": ALL}),
    "mixtral, all kv heads": ("Mixtral", {"num_key_value_heads": 4}, {"modules": ALL}),
    "mixtral, a width of no 16 bytes": ("Mixtral", {"intermediate_size": 45}, {"modules": ALL}),
    "qwen2moe, some layers": ("Qwen2Moe", {}, {"modules": OUTER}),
    "qwen2moe, softmax": ("Qwen2Moe", {}, {"modules": ALL, "router": {"bias": False, "weight": "softmax"}}),
    "qwen2moe, softmax, some layers, tied": (
        "Qwen2Moe",
        {"tie_word_embeddings": True},
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
    "glm4moe, all layers, tied": ("Glm4Moe", {"tie_word_embeddings": True}, {"modules": ALL, "expert": LORA}),
    "glm4moe, a width that divides nothing": (
        "Glm4Moe",
        {},
        {"modules": BACK, "expert": {"kind": "lora", "width": 20}},
    ),
    "glm4moe, wider than the FFN": ("Glm4Moe", {}, {"modules": BACK, "expert": {"kind": "lora", "width": 50}}),
    "glm4moe, warm-up in front": ("Glm4Moe", {}, {"modules": ALL, "warmup": (0,), "expert": LORA}),
    "glm4moe, warm-up after": ("Glm4Moe", {}, {"modules": ALL, "warmup": (1,), "expert": LORA}),
    "llama": ("Llama", {}, None),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, None),
    "llama, all in warm-up": ("Llama", {}, {"modules": ALL, "warmup": (0, 1, 2), "router": {"kind": "type"}}),
    "llama, lora in warm-up": ("Llama", {}, {"modules": BACK, "warmup": (0, 1), "expert": LORA}),
    "gpt2": ("GPT2LMHead", {"model_type": "gpt2"}, None),
    "mixtral, mistral with a window": ("Mixtral", {"model_type": "mistral", "sliding_window": 11}, {"modules": ALL}),
    "qwen2moe, qwen2": ("Qwen2Moe", {"model_type": "qwen2"}, {"modules": OUTER}),
    "qwen2moe, mistral": (
        "Qwen2Moe",
        {"model_type": "mistral", "sliding_window": None},
        {"modules": OUTER, "router": {"bias": False, "weight": "softmax"}},
    ),
    "glm4moe, mistral": (
        "Glm4Moe",
        {"model_type": "mistral", "sliding_window": None},
        {"modules": BACK, "expert": LORA},
    ),
    "mixtral, a llama whose config has a window": ("Mixtral", {"sliding_window": 4}, {"modules": ALL}),
    "qwen3moe, heads as wide as usual": ("Qwen3Moe", {"model_type": "qwen3", "head_dim": 8}, {"modules": ALL}),
    "glm4moe, positions of llama 3": (
        "Glm4Moe",
        {"rope_parameters": LLAMA3},
        {"modules": ALL, "expert": LORA},
    ),
    "qwen3moe": ("Qwen3Moe", {"model_type": "qwen3", "head_dim": 12}, {"modules": BACK}),
    "glm4moe, qwen3": ("Glm4Moe", {"model_type": "qwen3", "head_dim": 12}, {"modules": BACK, "expert": LORA}),
    "glm4moe, qwen2": ("Glm4Moe", {"model_type": "qwen2"}, {"modules": ALL, "expert": LORA}),
    "glm4moe, sigmoids of several": (
        "Glm4Moe",
        {},
        {
            "modules": BACK,
            "expert": LORA,
            "router": {
                "kind": "random",
                "weight": "sigmoid",
                "learn": True,
                "top_k": 2,
                "normalise": True,
                "scale": 2.5,
            },
        },
    ),
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
    facts = write(model, tmp_path / "out", choice="stock")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert facts["architecture"] == type(found).__name__ == stock
    assert facts["parameters"] == sum(parameter.numel() for parameter in found.parameters())
    with torch.no_grad():
        expected, logits = model(tiny.ids(5)).logits, found(input_ids=tiny.ids(5)).logits
    largest = expected.abs().max().item()
    assert (logits - expected).abs().max().item() < 1e-5 * largest
    prompt = tiny.ids(6, batch=2, length=5)
    generated = found.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(generated, tiny.greedy(model, prompt, 20))
    assert facts["logit_difference"] < 1e-5
    # The files are those that the class itself would write.
    found.save_pretrained(tmp_path / "by transformers")
    assert names(tmp_path / "out") == names(tmp_path / "by transformers")
    # The control: had two experts changed places, these ids would have shown it.
    counts = tiny.tokens_of_experts(model, tiny.ids(5))
    assert all(min(tokens) > 0 for tokens in counts.values())
    assert facts["experts_compared"] == tiny.EXPERTS * len(counts)
    for block in model.modules():
        if isinstance(block, Block) and block.name in counts:
            gate = block.banks[0].gate
            gate.key.cluster_weight.copy_(gate.key.cluster_weight[[1, 0, 2, 3]])
            with torch.no_grad():
                assert (model(tiny.ids(5)).logits - logits).abs().max().item() > 1e-2 * largest


@mark.parametrize("name", ["mixtral", "qwen2moe, softmax", "glm4moe", "mixtral, a width of no 16 bytes"])
def test_bf16_keeps_the_router(name, tmp_path):
    model, _ = build(name)
    exact = {
        block.name: block.banks[0].gate.key.cluster_weight.clone() for block in model.modules() if type(block) is Block
    }
    facts = write(model, tmp_path / "out", "bf16")
    folder = tmp_path / "out"
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    kinds = {key: kind for key, (_, kind) in names(folder).items()}
    routers = {key for key in kinds if ".gate." in key}
    assert len(routers) >= len(exact)
    assert {kinds[key] for key in routers} == {"F32"} and {kinds[key] for key in kinds.keys() - routers} == {"BF16"}
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = model(tiny.ids(5)).logits, wide(input_ids=tiny.ids(5)).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for block_name, gate in exact.items():
        kept = wide.get_submodule(block_name).gate.weight
        scale = kept.norm() / gate.norm()
        assert torch.equal(kept, gate * 2.0 ** torch.log2(scale).round())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is torch.bfloat16
    assert facts["logit_difference"] < 1e-5


def test_a_loud_gate_does_not_saturate_the_sigmoid(tmp_path, monkeypatch):
    model, _ = build("glm4moe")
    for layer in model.model.layers[1:]:
        layer.post_attention_layernorm.weight.data *= 30
        layer.mlp.banks[0].gate.key.cluster_weight *= 50
    write(model, tmp_path / "good")
    monkeypatch.setattr(glm4_moe, "sigmoid_scale", lambda *_: 1.0)
    with raises(CheckpointError, match="differ from the trained"):
        write(model, tmp_path / "saturated")


def test_a_bias_that_changes_no_choice_is_exported(tmp_path):
    model = tiny.decoder()
    for block in tiny.add_blocks(model, ALL, router={"weight": "softmax"}):
        weight, bias = tiny.cluster_gate(1)
        block.banks[0].gate.key.set(weight, bias + 3.5)
    assert write(model, tmp_path / "out", choice="stock")["logit_difference"] < 1e-5


def test_the_generation_config_goes_along(tmp_path):
    model = build("mixtral")[0]
    model.generation_config.eos_token_id, model.generation_config.top_k = [2, 7], 11
    write(model, tmp_path / "out", choice="stock")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (found.eos_token_id, found.top_k) == ([2, 7], 11)


def test_special_tokens_are_in_the_config(tmp_path):
    for name in ("mixtral", "qwen2moe, softmax", "glm4moe", "llama", "gpt2"):
        model = build(name)[0]
        for config in (model.config, model.generation_config):
            config.bos_token_id, config.eos_token_id, config.pad_token_id = 7, 8, 9
        write(model, tmp_path / name)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for config in (found.config, found.generation_config):
            assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 8, 9)


def refusal(model: torch.nn.Module, tmp_path) -> str:
    """The message that says why a model is not a stock class; the class around it takes it, and remembers why."""
    with raises(CheckpointError) as caught:
        write(model, tmp_path / "out", choice="stock")
    facts = write(model, tmp_path / "out")
    assert (facts["architecture"], facts["reason"]) == ("MocteBlocksForCausalLM", str(caught.value))
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
def test_what_no_stock_class_computes_becomes_the_class_around_the_base(blocks, message, tmp_path):
    model = tiny.decoder()
    default = {} if "banks" in blocks else {"router": {"bias": False}}
    tiny.add_blocks(model, **{**default, **blocks})
    assert re.search(message, refusal(model, tmp_path))


@mark.parametrize(
    ("changes", "blocks", "message"),
    [
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            {},
            "window",
        ),
        ({"attention_bias": True}, {}, "attention_bias"),
        ({"mlp_bias": True}, {}, "mlp_bias"),
        ({"hidden_act": "relu"}, {}, "gated by silu"),
        ({"model_type": "mistral", "sliding_window": 8}, {"modules": OUTER}, "has no sliding_window"),
        ({"model_type": "gemma"}, {}, "in the layers of a GemmaForCausalLM"),
    ],
)
def test_base_models_whose_layers_no_mixture_has(changes, blocks, message, tmp_path):
    model = tiny.decoder(**changes)
    tiny.add_blocks(model, **{"modules": ALL, "router": {"bias": False}, **blocks})
    assert message in refusal(model, tmp_path)


def test_what_no_class_computes_is_refused(tmp_path):
    model = tiny.decoder()
    tiny.add_blocks(model, "model.layers.1.self_attn.o_proj", router={"bias": False})
    with raises(CheckpointError, match="o_proj is not the FFN of a layer"):
        find_mixture(HeldSource(model))
    with raises(ConfigError, match="class = 'best': not one of"):
        write(tiny.decoder(), tmp_path / "out", choice="best")


def test_scale_is_a_power_of_two_and_bounds_the_logits():
    generator = torch.Generator().manual_seed(0)
    for factor in (1e-6, 1.0, 3e7):
        gate, norm = factor * torch.randn(4, 32, generator=generator), torch.rand(32, generator=generator) * 9
        scale = glm4_moe.sigmoid_scale(gate, norm)
        unit = torch.randn(1000, 32, generator=generator)
        features = unit / unit.square().mean(1, keepdim=True).sqrt() * norm
        largest = (features @ (gate * scale).T).abs().max().item()
        assert torch.log2(torch.tensor(scale)).item() == approx(round(torch.log2(torch.tensor(scale)).item()))
        assert 0.1 < largest <= 1
    assert glm4_moe.sigmoid_scale(torch.zeros(4, 32), torch.ones(32)) == 1


def test_every_family_is_a_class_of_transformers_and_in_the_docs():
    """The tables in the README and in docs/huggingface.md are those of the registry."""
    text = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("ForCausalLM |") == len(FAMILIES)
    for name, family in FAMILIES.items():
        assert hasattr(transformers, name) and family.model_type in transformers.CONFIG_MAPPING
        bases = ", ".join(base.removesuffix("ForCausalLM") for base in family.bases) or "itself alone"
        assert f"| {name} | {family.kind} | {family.routing} | {bases} |" in text
        assert f"| {name} | {bases} |" in readme
