"""FFNs of transformers' architectures are found by shape, cut into banks, narrowed, and taken apart in closed form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense, T5ForConditionalGeneration

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights
from mocte_ds.errors import ConfigError
from mocte_ds.moe import BlockMode, attach
from mocte_ds.moe.attach import find_ffns
from mocte_ds.moe.experts import feature_size, make_expert
from mocte_ds.moe.ffn_shape import FFNShape, FFNSlice, ffn_shape
from mocte_ds.moe.loose import gather_named
from mocte_ds.trainability.forms import known_ffn

D, F, V = 16, 24, 40
IDS = torch.randint(3, V, (2, 10), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V, "use_cache": False}
LLAMA = {**SIZES, "intermediate_size": F, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = FFNShape(("gate_proj", "up_proj"), "down_proj", D, F)
FUSED = FFNShape(("gate_up_proj",), "down_proj", D, F, fused=True)
LOOSE = FFNShape(("fc1",), "fc2", D, F)
NEOX = FFNShape(("dense_h_to_4h",), "dense_4h_to_h", D, F)


@dataclass(frozen=True)
class Case:
    values: dict[str, Any]
    modules: str
    shape: FFNShape


CASES = {
    "llama": Case(LLAMA, "model.layers.*.mlp", GATED),
    "qwen3": Case(LLAMA, "model.layers.*.mlp", GATED),
    "gemma3_text": Case(LLAMA, "model.layers.*.mlp", GATED),
    "phi3": Case({**LLAMA, **TOKENS}, "model.layers.*.mlp", FUSED),
    "glm4": Case({**LLAMA, **TOKENS}, "model.layers.*.mlp", FUSED),
    "gpt_neox": Case({**SIZES, "intermediate_size": F}, "gpt_neox.layers.*.mlp", NEOX),
    "falcon": Case({**SIZES, "num_attention_heads": 4, "ffn_hidden_size": F}, "transformer.h.*.mlp", NEOX),
    "phi": Case({**SIZES, "intermediate_size": F}, "model.layers.*.mlp", FFNShape(("fc1",), "fc2", D, F)),
    "gpt2": Case(
        {"n_embd": D, "n_inner": F, "n_layer": 2, "n_head": 2, "vocab_size": V, "use_cache": False},
        "transformer.h.*.mlp",
        FFNShape(("c_fc",), "c_proj", D, F),
    ),
    # Their layers call the matrices themselves: the first one stands for the FFN.
    "opt": Case({**SIZES, "ffn_dim": F, "word_embed_proj_dim": D}, "model.decoder.layers.*.fc1", LOOSE),
    "xglm": Case({**SIZES, "ffn_dim": F}, "model.layers.*.fc1", LOOSE),
    "biogpt": Case({**SIZES, "intermediate_size": F}, "biogpt.layers.*.fc1", LOOSE),
}


def model(name: str) -> nn.Module:
    """A small model with random weights, biases among them."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CASES[name].values)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("name", CASES)
def test_shape_and_closed_form(name: str) -> None:
    case, made = CASES[name], model(name)
    gather_named(made, find_ffns(made))
    found = [path for path, module in made.named_modules() if ffn_shape(module) is not None]
    assert found == [case.modules.replace("*", str(number)) for number in range(2)]
    ffn = made.get_submodule(found[0])
    assert ffn_shape(ffn) == case.shape
    assert known_ffn(ffn, torch.randn(5, D)) is not None


@pytest.mark.parametrize("kind", ["ffn", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_two_banks_keep_the_function(name: str, kind: str) -> None:
    made = model(name)
    before = made(input_ids=IDS).logits
    banks = [{"kind": "token"}, {"kind": "hash"}]
    config = {"modules": CASES[name].modules, "num_experts": 4, "expert": {"kind": kind}, "banks": banks}
    blocks = attach(made, MocteConfig.from_dict(config))
    assert [block.layer for block in blocks] == [0, 1]
    for block in blocks:
        block.banks[0].gate.key.set(torch.randn(4, D), torch.zeros(4))
        block.banks[1].gate.key.set(torch.arange(V) % 4)
        if kind == "ffn":
            copy_dense_weights(block)
        block.mode = BlockMode.SPECIALISING
        assert ffn_shape(block.banks[1].local_experts[0]).width == (F // 2 if kind == "ffn" else F // 8)
    after = made(input_ids=IDS).logits
    assert blocks[0].banks[1].deepspeed_moe.exp_counts.count_nonzero() > 1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def square() -> nn.Module:
    """d = f: the matrix that was registered last writes the output."""
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (square, FFNShape(("0",), "2", D, D)),
        (lambda: T5DenseActDense(T5Config(d_model=D, d_ff=F)), FFNShape(("wi",), "wo", D, F)),
        (lambda: T5DenseGatedActDense(T5Config(d_model=D, d_ff=F)), FFNShape(("wi_0", "wi_1"), "wo", D, F)),
        (lambda: nn.Linear(D, D), None),
        (lambda: nn.Sequential(nn.Linear(D, F), nn.Linear(F, F), nn.Linear(F, D)), None),
        (lambda: nn.Sequential(nn.Linear(D, F), nn.Embedding(V, F), nn.Linear(F, D)), None),
        (lambda: nn.MultiheadAttention(D, 2), None),
    ],
)
def test_other_modules(make: Callable[[], nn.Module], expected: FFNShape | None) -> None:
    assert ffn_shape(make()) == expected


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_ffns_of_t5(act: str) -> None:
    """T5 and Flan-T5; encoder-decoders are refused as a whole (test_two_streams.py)."""
    config = T5Config(d_model=D, d_ff=F, num_layers=2, num_heads=2, d_kv=8, vocab_size=V, feed_forward_proj=act)
    made = T5ForConditionalGeneration(config)
    assert find_ffns(made.encoder) == [f"block.{i}.layer.1.DenseReluDense" for i in range(2)]
    assert find_ffns(made.decoder) == [f"block.{i}.layer.2.DenseReluDense" for i in range(2)]
    ffn = made.decoder.get_submodule("block.1.layer.2.DenseReluDense")
    assert ffn_shape(ffn) == FFNShape(("wi",) if act == "relu" else ("wi_0", "wi_1"), "wo", D, F)


class Swapped(nn.Module):
    """The output was registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(F, D), nn.Linear(D, F)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Around(nn.Module):
    """An FFN with something around or inside it, which its shape does not tell."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.w1, self.w2 = what, nn.Linear(D, F), nn.Linear(F if what != "interleaved" else F // 2, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.w1(x)
        if self.what == "interleaved":
            h = h[..., ::2] * h[..., 1::2].sigmoid()
        elif self.what == "norm inside":
            h = nn.functional.layer_norm(h.relu(), h.shape[-1:])
        y = self.w2(h)
        return x + y if self.what == "residual" else y.softmax(-1) if self.what == "softmax" else y


class Doubling(nn.Linear):
    """Not the product that its class promises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class MetaNames(nn.Module):
    """w1 and w3 read the feature, w2 in between writes the output; with d = f shapes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def test_the_order_of_registration_does_not_matter_where_shapes_tell() -> None:
    assert ffn_shape(Swapped()) == FFNShape(("up",), "down", D, F)
    assert feature_size(Swapped(), "ffn") == D


@pytest.mark.parametrize("kind", ["ffn", "lora"])
@pytest.mark.parametrize(
    "make",
    [
        *(lambda what=what: Around(what) for what in ("residual", "norm inside", "interleaved", "softmax")),
        MetaNames,
        lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)),
        lambda: nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D), nn.LayerNorm(D)),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(make: Callable[[], nn.Module], kind: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot narrow layers.0.mlp .*Use kind 'ffn' and one bank"):
        make_expert(make(), kind, 2 if kind == "lora" else None, 4, "layers.0.mlp", FFNSlice(0, 2))
    expert = make_expert(ffn := make(), "ffn", None, 4, "layers.0.mlp")
    x = torch.randn(3, D)
    assert torch.equal(expert(x), ffn(x)), "a whole copy is right for any module"


def test_linear_layers_of_another_kind_have_no_slices() -> None:
    ffn = nn.Sequential(Doubling(D, F), nn.ReLU(), Doubling(F, D))
    with pytest.raises(ConfigError, match="compute something else than torch's"):
        make_expert(ffn, "ffn", None, 4, "mlp", FFNSlice(1, 2))


def test_without_weights_nothing_is_called() -> None:
    with torch.device("meta"):
        make_expert(Around("residual"), "lora", 2, 4, "mlp")
