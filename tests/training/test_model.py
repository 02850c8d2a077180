"""Models of a run: transformers' own configs, refusals, documents, and the loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mocte_ds.base_model import base_facts
from mocte_ds.errors import ConfigError
from mocte_ds.sections import parse_section
from mocte_ds.training.model import CheckpointModel, Forward, TransformersModel, config_sizes, make_model, model_facts

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
END = 2


def hf(kind: str = "llama", **more: Any) -> TransformersModel:
    return TransformersModel(hf={"model_type": kind, **SIZES, **more})


def test_the_config_is_the_class_s_with_our_values() -> None:
    config = hf(rope_theta=500.0, max_position_embeddings=64)
    assert isinstance(config.config, LlamaConfig)
    assert (config.vocab_size, config.max_positions, config.num_heads) == (40, 64, 2)
    model = make_model(config, END)
    assert isinstance(model, LlamaForCausalLM) and next(model.parameters()).dtype is torch.float32
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.eos_token_id == END == model.generation_config.eos_token_id
    assert model.config.pad_token_id is None, "an embedding of padding gets no gradient"
    assert model.config.rope_parameters["rope_theta"] == 500.0
    sizes = config_sizes(config)
    assert (sizes.hidden_size, len(sizes.layers), sizes.layers[0].ffn) == (16, 2, 3 * 16 * 24)


def test_given_special_tokens_stay() -> None:
    model = make_model(hf(eos_token_id=7, pad_token_id=3), END)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (7, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hf": {"model_type": "lama"}}, r"model\.hf\.model_type = 'lama' is not .* Did you mean 'llama'\?"),
        ({"hf": {**SIZES}}, r"model\.hf\.model_type = None"),
        ({"hf": {"model_type": "t5"}}, "not a causal language model"),
        ({"hf": {"model_type": "llama", "hiden_size": 3}}, r"unknown key 'hiden_size' of a LlamaConfig\. Did you mean"),
        ({"hf": {"model_type": "llama", "hidden_size": "x"}}, "LlamaConfig refuses it: .*hidden_size"),
        ({"hf": {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}}, "LlamaConfig refuses it"),
        ({"hf": {"model_type": "gpt2", "rope_theta": 5.0}}, "unknown key 'rope_theta'"),
        ({"hf": {"model_type": "gpt2", "n_embd": 8, "hidden_size": 8}}, "two names of one key"),
        ({"hf": [1]}, r"model\.hf = \[1\] must be"),
        ({"hf": {"model_type": "llama"}, "pretrained": "x"}, "exclude each other"),
        ({}, "exclude each other"),
        ({"pretrained": "nowhere"}, "not a folder in Hugging Face format"),
        ({"hf": {"model_type": "llama"}, "vocab_size": 3}, "unknown key model.vocab_size"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(TransformersModel, values)


def test_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=32)).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    config = TransformersModel(pretrained=str(tmp_path))
    ours = make_model(config)
    assert all(torch.equal(ours.state_dict()[name], t.float()) for name, t in theirs.state_dict().items())
    assert next(ours.parameters()).dtype is torch.float32
    assert model_facts(config)["hf.hidden_size"] == 16 and model_facts(config)["pretrained"] == str(tmp_path)
    other = make_model(config, weights=False)
    assert not torch.equal(other.lm_head.weight, ours.lm_head.weight)


def test_every_row_of_the_embedding_trains_and_dropout_is_on(tmp_path: Path) -> None:
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=END, pad_token_id=END))
    theirs.generation_config.num_beams = 3
    theirs.save_pretrained(tmp_path)
    config = TransformersModel(pretrained=str(tmp_path))
    for model in (make_model(config), make_model(config, weights=False)):
        assert model.training and model.generation_config.num_beams == 3
        forward, ids = Forward(model, None), torch.tensor([[5, END, 6, END]])
        assert model.training
        forward.loss(model(**forward.inputs(ids)), ids.roll(-1, 1)).backward()
        assert model.get_input_embeddings().weight.grad[END].abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "codegen", "bamba", "phi3"])
def test_a_stored_config_makes_the_same_model(kind: str) -> None:
    """bamba has infinite numbers, codegen no key for padding."""
    sizes = {"vocab_size": 40, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"mamba_n_heads": 8, "mamba_d_head": 32, "num_key_value_heads": 4, "intermediate_size": 16}
    first = TransformersModel(hf={"model_type": kind, **sizes, **(more if kind == "bamba" else {})})
    with torch.device("meta"):
        model = make_model(first, END)
    stored = json.loads(json.dumps(base_facts(model), allow_nan=False))
    again = CheckpointModel(base=stored)
    with torch.device("meta"):
        assert base_facts(make_model(again, END)) == stored
    facts = model_facts(again)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    wanted = {key: value for key, value in model_facts(first).items() if key not in ("pretrained", "hf.eos_token_id")}
    assert wanted == {key: value for key, value in facts.items() if key != "hf.eos_token_id"}


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"in BertLMHeadModel of this config tokens see later ones.*is_decoder"):
        Forward(make_model(hf("bert")), None)
    Forward(make_model(hf("bert", is_decoder=True)), None)


def test_no_longest_context() -> None:
    config = TransformersModel(
        hf={"model_type": "bloom", "vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    )
    assert config.max_positions == 1 << 30


def test_another_value_is_another_model() -> None:
    assert model_facts(hf()) != model_facts(hf(rms_norm_eps=1e-3))


def test_the_loss_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    model, ids = make_model(hf()), torch.randint(40, (3, 9))
    expected = model(input_ids=ids, labels=ids).loss
    inputs = Forward(model, None).inputs(ids)
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    torch.testing.assert_close(Forward(model, None).loss(model(**inputs), shifted), expected)


def test_a_mixture_keeps_its_loss_for_even_loads() -> None:
    torch.manual_seed(0)
    sizes = {"num_local_experts": 4, "num_key_value_heads": 2, "output_router_logits": True}
    model, ids = make_model(hf("mixtral", **sizes, router_aux_loss_coef=0.5)), torch.randint(40, (3, 9))
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    forward, theirs = Forward(model, None), model(input_ids=ids, labels=ids)
    assert theirs.aux_loss > 0.1
    torch.testing.assert_close(forward.loss(model(**forward.inputs(ids)), shifted), theirs.loss)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_documents_of_a_packed_sequence_do_not_see_each_other(kind: str) -> None:
    torch.manual_seed(0)
    first, second = torch.tensor([5, 6, 7, END]), torch.tensor([8, 9, 10])
    heads = {"num_key_value_heads": 1, "head_dim": 8} if kind in ("qwen3", "gemma3_text") else {}
    values = {"model_type": kind, **SIZES, **heads}
    if kind == "gpt2":
        values["n_inner"] = values.pop("intermediate_size")
    config = TransformersModel(hf=values)
    model = make_model(config).eval()
    packed = model(**Forward(model, END).inputs(torch.cat([first, second])[None])).logits[0]
    alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in (first, second)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    crossing = model(**Forward(model, None).inputs(torch.cat([first, second])[None])).logits[0]
    assert not torch.allclose(crossing[4:], alone[4:], atol=1e-4)


def test_a_model_that_sees_over_borders_is_refused() -> None:
    torch.manual_seed(0)
    config = parse_section(
        TransformersModel, {"hf": {"model_type": "mamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}}
    )
    with pytest.raises(ConfigError, match=r"data\.document_mask: in MambaForCausalLM"):
        Forward(make_model(config), END)


def test_a_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM of this config cannot be called: .* must match"):
        Forward(make_model(hf("qwen3", head_dim=8, num_key_value_heads=3)), None)


def test_layers_are_computed_again_on_demand() -> None:
    config = replace(hf(), activation_checkpointing=True)
    model = make_model(config)
    assert model.is_gradient_checkpointing and not make_model(hf()).is_gradient_checkpointing
    assert config_sizes(config).recomputes
