"""What a checkpoint keeps of the user's model makes the same config again; what cannot be kept is told by name."""

import json

import torch
from pytest import mark, raises
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mocte_ds.base_model import base_facts, make_config, require_base
from mocte_ds.errors import CheckpointError

SIZES = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {"rotary_pct": 0.5},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},  # has an infinite limit
}


def model(kind: str) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **SIZES[kind]}))


def as_json(config) -> dict:
    """Its values but for those of whoever made it."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k != "architectures"}


@mark.parametrize("kind", SIZES)
def test_the_config_comes_back(kind: str) -> None:
    there = model(kind)
    facts = base_facts(there)
    assert facts == json.loads(json.dumps(facts, allow_nan=False)), "plain values alone"
    assert (facts["architecture"], facts["model_type"]) == (type(there).__name__, kind)
    again = make_config(require_base(facts, "here"), "here")
    assert type(again) is type(there.config) and as_json(again) == as_json(there.config)
    assert facts["generation"]["eos_token_id"] == there.config.eos_token_id


def test_what_cannot_be_kept_is_told() -> None:
    def said(there: nn.Module) -> str:
        with raises(CheckpointError) as error:
            require_base(base_facts(there), "runs/one")
        return str(error.value)

    assert "runs/one does not say which model it holds: the model is a torch.nn.modules.linear.Linear" in said(
        nn.Linear(2, 2)
    )
    strange = model("llama")
    strange.config.helper = nn.Linear(2, 2)
    assert "config of LlamaForCausalLM cannot be kept in plain values" in said(strange)
    strange.config.helper = "x" * 2_000_000
    assert "1,048,576 are the most" in said(strange)

    class Mine(LlamaForCausalLM):
        pass

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert base_facts(Mine(config))["architecture"] == "Mine"
    with raises(CheckpointError, match="does not say which model it holds"):
        require_base(None, "runs/one")
    other = {"architecture": "XForCausalLM", "model_type": "x", "config": {}, "generation": None}
    with raises(CheckpointError, match="model_type 'x'.*register"):
        make_config(other, "here")
    with raises(CheckpointError, match="transformers refuse the config of its llama"):
        make_config({**other, "model_type": "llama", "config": {"hidden_size": "many"}}, "here")
    with raises(CheckpointError, match="it is damaged"):
        require_base({"architecture": "LlamaForCausalLM", "config": {}}, "runs/one")
