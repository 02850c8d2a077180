"""First weights of residual outputs: smaller with depth, once, and only where a run draws them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.base_model import base_facts
from mocte_ds.training.model import CheckpointModel, TransformersModel, make_model
from mocte_ds.training.residual_scale import scale_residual_outputs

LAYERS = 8
SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "mixtral": ("self_attn.o_proj", "mlp.experts.down_proj"),
}


def hf(kind: str, **more: Any) -> TransformersModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if kind == "phi3" else {}
    return TransformersModel(hf={"model_type": kind, **SIZES, **special, **more})


@pytest.mark.parametrize("kind", WRITERS)
def test_residual_outputs_are_drawn_smaller(kind: str) -> None:
    torch.manual_seed(0)
    model = make_model(hf(kind))
    small = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            writes = name.removesuffix(".weight").endswith(WRITERS[kind])
            expected = 0.02 * ((2 * LAYERS) ** -0.5 if writes else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            small += writes
    assert small == 2 * LAYERS
    assert scale_residual_outputs(model, model.config) == [], "once"


def test_a_single_layer() -> None:
    """The factor is nearest to 1 there."""
    for seed in range(20):
        torch.manual_seed(seed)
        for kind, count in (("llama", 2), ("gpt2", 0)):
            model = make_model(hf(kind, num_hidden_layers=1), weights=False)
            assert len(scale_residual_outputs(model, model.config)) == count


def test_weights_of_a_folder_or_checkpoint_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = make_model(hf("llama"), weights=False)
    name = "model.layers.0.mlp.down_proj.weight"
    wide = theirs.get_parameter(name).clone()
    assert wide.std().item() == pytest.approx(0.02, rel=0.1)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(make_model(TransformersModel(pretrained=str(tmp_path))).get_parameter(name), wide)
    stored = make_model(CheckpointModel(base=base_facts(theirs)))
    assert stored.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
