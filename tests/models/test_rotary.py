"""Frequencies of rotary positions against those of transformers."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mocte_ds.errors import ConfigError
from mocte_ds.models import DecoderConfig
from mocte_ds.models.rotary import frequencies

LLAMA = DecoderConfig("llama", 2048, 128, 352, 4, 4, 2)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize(
    "scaling", [LINEAR, LLAMA3, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64}]
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_frequencies(scaling: dict, share: float) -> None:
    parameters = {**scaling, "rope_theta": 5e5, "partial_rotary_factor": share}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    assert factor == 1.0 and torch.equal(frequencies(int(128 * share), 5e5, scaling), expected)
    plain = frequencies(int(128 * share), 5e5, None)
    assert (plain - expected).abs().max() > 0 and (plain[0] == expected[0]) == (scaling["rope_type"] == "llama3")


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn' is not one of"),
        ({"rope_type": "linear"}, "needs positive factor"),
        ({"rope_type": "linear", "factor": 0.0}, "needs positive factor"),
        ({**LINEAR, "low_freq_factor": 1.0}, "needs positive factor"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "must be smaller than high_freq_factor"),
    ],
)
def test_what_is_refused(scaling: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(LLAMA, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rotary_share": 0.1}, "rotary_share = 3 must be even"),
        ({"ffn_sizes": [8]}, "a size for each of the 4 layers"),
        ({"qk_norm": True, "head_norm": True}, "two places for one norm"),
        ({"sliding_window": 0}, "sliding_window = 0"),
    ],
)
def test_sizes_that_contradict_each_other(values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(LLAMA, **values)
    with pytest.raises(ConfigError, match="is for the llama style"):
        DecoderConfig("gpt2", 10, 8, 8, 4, 1, **values)
