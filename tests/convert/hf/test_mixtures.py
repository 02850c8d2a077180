"""Mixtures of experts in Hugging Face format as starts of a run: routers are kept, with one or several experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mocte_ds.convert.hf.export import export
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block
from tests.checkpoints import tiny
from tests.checkpoints.held import write
from tests.checkpoints.loaded import load_model
from tests.convert.hf.test_import import CONFIGS, HEADS, SIZES, VOCAB, fingerprint, setting, weights, write_folder
from tools import inspect_checkpoint, reshape
from tools.import_hf import main

COMMON = {**SIZES, **HEADS, "eos_token_id": 0}
MIXTRAL = {"num_local_experts": 4, "sliding_window": None}
# Hidden units of zeros: the class insists on a shared expert.
QWEN = {
    "num_experts": 4,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GLM = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
QWEN3 = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 12, "mlp_only_layers": [0]}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**GLM, **LATENT, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
# Stock: half of a head's features turn. Nothing is left at its usual value.
GLM_ALL = {
    **GLM,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "head_dim": 12,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5},
}
# The config, and the router that the run gets: weight, top_k, normalise.
CASES: dict[str, tuple[PreTrainedConfig, tuple[str, int, bool]]] = {
    "mixtral, 1": (MixtralConfig(**COMMON, **MIXTRAL, num_experts_per_tok=1), ("hard", 1, False)),
    "mixtral, 2": (MixtralConfig(**COMMON, **MIXTRAL, num_experts_per_tok=2), ("softmax", 2, True)),
    "olmoe, 1": (OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=1), ("softmax", 1, False)),
    "olmoe, 3": (OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=3), ("softmax", 3, False)),
    "olmoe, all": (
        OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=4, norm_topk_prob=True),
        ("softmax", 4, True),
    ),
    "qwen2moe, 2": (Qwen2MoeConfig(**COMMON, **QWEN, num_experts_per_tok=2), ("softmax", 2, False)),
    "qwen2moe, some layers": (
        Qwen2MoeConfig(**COMMON, **{**QWEN, "mlp_only_layers": [0]}, num_experts_per_tok=2, qkv_bias=False),
        ("softmax", 2, False),
    ),
    "qwen2moe, other widths": (
        Qwen2MoeConfig(
            **COMMON, **{**QWEN, "mlp_only_layers": [1], "moe_intermediate_size": 24}, num_experts_per_tok=1
        ),
        ("softmax", 1, False),
    ),
    "mixtral, a window": (
        MixtralConfig(**COMMON, **{**MIXTRAL, "sliding_window": 16}, num_experts_per_tok=2),
        ("softmax", 2, True),
    ),
    "qwen3moe, 2": (
        Qwen3MoeConfig(**COMMON, **QWEN3, num_experts_per_tok=2, norm_topk_prob=True),
        ("softmax", 2, True),
    ),
    "deepseek_v3, 2": (DeepseekV3Config(**{**COMMON, **DEEPSEEK}, num_experts_per_tok=2), ("sigmoid", 2, True)),
    "glm4moe, 1": (Glm4MoeConfig(**COMMON, **GLM, num_experts_per_tok=1), ("sigmoid", 1, True)),
    "glm4moe, 2": (Glm4MoeConfig(**COMMON, **GLM, num_experts_per_tok=2), ("sigmoid", 2, True)),
    "glm4moe, 3": (Glm4MoeConfig(**COMMON, **GLM_ALL, num_experts_per_tok=3), ("sigmoid", 3, True)),
    "glm4moe, sigmoids": (
        Glm4MoeConfig(**COMMON, **{**GLM, "first_k_dense_replace": 0}, num_experts_per_tok=2, norm_topk_prob=False),
        ("sigmoid", 2, False),
    ),
}


def empty_shared_experts(model: torch.nn.Module) -> None:
    """And, where the choice is corrected, numbers that correct it."""
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(0.3 * torch.randn(buffer.shape))
    for name, parameter in model.named_parameters():
        if "shared_expert." in name or "shared_expert_gate" in name:
            parameter.data.fill_("shared_expert_gate" in name)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_function_and_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, (weight, top_k, normalise) = CASES[name]
    source = write_folder(tmp_path / "folder", config, change=empty_shared_experts, dtype=dtype)
    before = fingerprint(source)
    assert main([str(source), str(tmp_path / "start")]) == 0
    assert fingerprint(source) == before
    ids = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ours, state = load_model(tmp_path / "start")
    router = state["mocte"]["router"]
    assert (router["weight"], router["top_k"], router["normalise"]) == (weight, top_k, normalise)
    assert router["learn"] is (weight != "hard" and not (weight == "sigmoid" and top_k == 1 and normalise))
    blocks = [module for module in ours.modules() if isinstance(module, Block)]
    choices: list[int] = []
    for block in blocks:
        hook = lambda _gate, _inputs, found: choices.append(found[0].shape[1])  # noqa: E731
        block.banks[0].gate.register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert choices == [top_k] * len(blocks) and blocks
    export(tmp_path / "start", tmp_path / "back", {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    found, expected = weights(tmp_path / "back"), weights(source)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype and torch.equal(found[key], tensor), key
    stored = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert stored[0]["architectures"] == stored[1]["architectures"]
    different = {key for key in stored[0] if stored[0][key] != stored[1].get(key)}
    # A layer that guesses further tokens, which no class of transformers has.
    assert not different - {"transformers_version", "num_nextn_predict_layers"}, {
        key: (stored[0][key], stored[1].get(key)) for key in different
    }


def test_a_shared_expert_of_zeros_may_be_wide(tmp_path: Path) -> None:
    values = {**QWEN, "shared_expert_intermediate_size": 24, "output_router_logits": True}
    config = Qwen2MoeConfig(**COMMON, **values, num_experts_per_tok=2)
    source = write_folder(tmp_path / "folder", config, change=empty_shared_experts)
    main([str(source), str(tmp_path / "start")])
    facts = export(tmp_path / "start", tmp_path / "back")
    assert facts["architecture"] == "Qwen2MoeForCausalLM" and facts["logit_difference"] < 1e-6


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a folder, each in the file that it is in."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in list(tensors):
            tensors[name] = change(name, tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})


def test_a_correction_in_fp32_beside_a_router_in_bf16(tmp_path: Path) -> None:
    """As published folders have them; either keeps its digits."""
    source = write_folder(
        tmp_path / "folder", CASES["glm4moe, 2"][0], change=empty_shared_experts, dtype=torch.bfloat16
    )
    rewrite(source, lambda name, t: t.bfloat16() if name.endswith("gate.weight") else t)
    rewrite(source, lambda name, t: t.float() + 1e-5 if "correction" in name else t)
    main([str(source), str(tmp_path / "start")])
    export(tmp_path / "start", tmp_path / "back", "bf16")
    found, expected = weights(tmp_path / "back"), weights(source)
    assert {t.dtype for name, t in expected.items() if "correction" in name} == {torch.float32}
    assert all(found[k].dtype is expected[k].dtype and torch.equal(found[k], expected[k]) for k in expected)


def test_a_layer_that_guesses_further_tokens_is_left_out(tmp_path: Path) -> None:
    """transformers leave such layers unread by their names, which may be those of layers that a model has."""
    config = CASES["deepseek_v3, 2"][0]
    source = write_folder(tmp_path / "folder", config, change=empty_shared_experts)
    setting(num_nextn_predict_layers=1)(source)
    first = min(source.glob("*.safetensors"))
    tensors = load_file(first)
    tensors["model.layers.61.eh_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, first, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.61.eh_proj.weight"] = first.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main([str(source), str(tmp_path / "start")]) == 0
    export(tmp_path / "start", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder", CASES["mixtral, 2"][0])
    rewrite(source, lambda name, t: t.index_fill(0, torch.tensor([3]), float("nan")) if "experts.2.w1" in name else t)
    with pytest.raises(MocteError, match=r"experts.2.gate_proj.weight holds numbers that are not finite"):
        main([str(source), str(tmp_path / "start")])


def test_a_native_mixture_with_blocks_beside_its_experts_is_no_stock_class(tmp_path: Path) -> None:
    model = tiny.decoder(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1]
    )
    tiny.add_blocks(model, "model.layers.1.mlp", router={"bias": False})
    with pytest.raises(MocteError, match="layer 0 has experts of the class itself"):
        write(model, tmp_path / "out", choice="stock")
    assert write(model, tmp_path / "out")["architecture"] == "MocteBlocksForCausalLM"


def test_narrow_experts_in_fp32_are_not_filled_up(tmp_path: Path) -> None:
    values = {**GLM, "moe_intermediate_size": 12}
    source = write_folder(tmp_path / "folder", Glm4MoeConfig(**COMMON, **values, num_experts_per_tok=2))
    main([str(source), str(tmp_path / "start"), "--fixed-router"])
    export(tmp_path / "start", tmp_path / "back")
    found, expected = weights(tmp_path / "back"), weights(source)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["mixtral, 2", "dense"])
def test_other_tools_on_weights_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are looked at, and not taken for what a run could go on from."""
    source = write_folder(tmp_path / "folder", CONFIGS["llama"] if name == "dense" else CASES[name][0])
    main([str(source), str(tmp_path / "start")])
    assert inspect_checkpoint.main([str(tmp_path / "start"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["whole"] and facts["weights_alone"] and facts["step"] == 0 and facts["tokens"] == 0
    assert len(facts["blocks"]) == (0 if name == "dense" else 2) and not facts["sizes"]["moments"]
    assert inspect_checkpoint.main([str(tmp_path / "start")]) == 0
    assert "none: weights alone, for model.init" in capsys.readouterr().out
    with pytest.raises(MocteError, match="holds weights alone.*name it as model.init"):
        reshape.main([str(tmp_path / "start"), str(tmp_path / "out"), "--world-size", "2"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["olmoe, 3", "mixtral, a window", "qwen2moe, other widths", "glm4moe, 3"])
def test_the_own_class_chooses_several_too(name: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder", CASES[name][0], change=empty_shared_experts)
    main([str(source), str(tmp_path / "start"), "--fixed-router"])
    facts = export(tmp_path / "start", tmp_path / "own", choice="own")
    assert facts["architecture"] == "MocteBlocksForCausalLM"
    ids = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True, dtype=torch.float32).eval()
    assert all("residual" not in name for name in own.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def busy_shared_expert(folder: Path) -> None:
    """The random one, as it was before it was emptied."""


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("glm4moe, 2", setting(n_group=2), "n_group = 2"),
        ("glm4moe, 2", setting(n_shared_experts=2), "shared_experts"),
        ("olmoe, 1", setting(clip_qkv=8.0), "clip_qkv"),
        ("mixtral, 2", setting(initializer_range=float("nan")), "folder"),
        ("mixtral, 2", setting(bos_token_id=10**29), "config.json"),
        ("mixtral, 2", setting(hidden_act="relu"), "gated by silu"),
        ("mixtral, 2", setting(num_local_experts=5), "moe.gate.weight has the shape"),
        ("qwen2moe, some layers", setting(intermediate_size=64), "layers.0.mlp"),
        ("qwen2moe, 2", busy_shared_expert, "shared_expert"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, harm: Any, told: str, tmp_path: Path) -> None:
    change = None if harm is busy_shared_expert else empty_shared_experts
    source = write_folder(tmp_path / "folder", CASES[name][0], change=change)
    harm(source)
    with pytest.raises(MocteError) as caught:
        main([str(source), str(tmp_path / "start")])
    assert told in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
