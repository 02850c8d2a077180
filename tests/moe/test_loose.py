"""FFNs whose matrices a layer calls itself: gathered where that is proven to change nothing, else refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.moe import Block, attach
from mocte_ds.moe.attach import find_ffns
from mocte_ds.moe.loose import gather_named, gathered, loose_ffns
from mocte_ds.remote_code.experts_mocte import GatheredFFN

D, F = 16, 24
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Attention's matrices and the FFN's side by side, the FFN's output registered first, under names of no model."""

    def __init__(self, between: str = "", width: int = F) -> None:
        super().__init__()
        self.between, self.p = between, 0.0
        self.down, self.gate = nn.Linear(width, D), nn.GELU()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up = nn.Linear(D, width)
        self.norm, self.scale = nn.LayerNorm(D), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return x + nn.functional.dropout(self.ffn(self.norm(x)), 0.1, self.training)

    def ffn(self, x: Tensor) -> Tensor:
        h = self.up(x)
        match self.between:
            case "a function":
                h = h.relu()
            case "a norm":
                h = self.scale(h)
            case "another view":
                h = self.gate(h.flatten(0, 1)).unflatten(0, x.shape[:2])
            case "dropout":
                h = nn.functional.dropout(self.gate(h), self.p, self.training)
            case "used twice":
                h = self.gate(h) * h.mean()
            case "called twice":
                h = self.gate(self.gate(h))
            case "read twice":
                return self.down(self.gate(h)) + h[..., :D]
            case "in evaluation only":
                h = self.gate(h) if self.training else self.gate(h) + 1
            case "its weight":
                h = self.gate(h.to(self.down.weight.dtype))
            case _:
                h = self.gate(h)
        return self.down(h)


class Fused(Layer):
    """Reads the weights where the device has a kernel for them, as torch's TransformerEncoderLayer does."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.is_cpu and not self.training:
            assert self.up.weight.is_cpu
        return super().forward(x)


class Model(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([make() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def config(modules: Any = "auto", **more: Any) -> MocteConfig:
    return MocteConfig.from_dict({"modules": modules, "num_experts": 2, "router": {"kind": "token"}, **more})


def outputs(model: nn.Module) -> list[Tensor]:
    """In evaluation mode, and in training mode with the dropout of a seed."""
    found = [model.eval()(X)]
    torch.manual_seed(1)
    return [*found, model.train()(X)]


@pytest.mark.parametrize("width", [F, D, 8])
def test_found_without_names(width: int) -> None:
    model = Model(lambda: Layer(width=width))
    before, modes = outputs(model), [part.training for part in model.modules()]
    state = torch.random.get_rng_state()
    assert find_ffns(model) == ["layers.0.up", "layers.1.up"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes, "looking at a model leaves no trace"
    blocks = attach(model, config())
    assert [(block.name, block.layer) for block in blocks] == [("layers.0.up", 0), ("layers.1.up", 1)]
    assert [name for name, _ in blocks[0].dense.named_children()] == ["up", "gate", "down"]
    assert blocks[0].names_outside["layers.0.up.dense.down.bias"] == "layers.0.down.bias"
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))


class Chain(nn.Module):
    """Three matrices that are called one after the other: each pair of neighbours would do, and one is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(D, D) for _ in range(3))
        self.norm, self.act = nn.LayerNorm(D), nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.c(self.b(self.act(self.a(self.norm(x)))))


def test_each_matrix_is_in_one_ffn() -> None:
    model = Model(Chain)
    before = outputs(model)
    assert len(loose_ffns(model.layers[0])) == 2
    assert [block.name for block in attach(model, config())] == ["layers.0.a", "layers.1.a"]
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))


def test_gathered_once() -> None:
    model = Model(Layer)
    before = outputs(model)
    gather_named(model, find_ffns(model))
    gather_named(model, find_ffns(model))
    assert type(model.layers[0].up) is GatheredFFN and type(model.layers[0].up.up) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))


REFUSED = {
    "a function": "Layer itself runs relu between up and down, not as a module",
    "another view": "Layer itself runs view(, _unsafe_view)? between up and down, not as a module",
    "used twice": "Layer itself runs mean, mul between up and down, not as a module",
    "called twice": "Layer uses up, gate, gate, down for more than to call one after the other",
    "read twice": "Layer uses up, gate, down for more than to call one after the other",
    "in evaluation only": "Layer itself runs add between up and down, not as a module",
    "its weight": "Layer uses up, gate, down for more than to call one after the other",
    "its fused kernel": r"Fused.forward reads self.up.weight itself",
}


@pytest.mark.parametrize("between", REFUSED)
def test_what_stands_in_the_way(between: str) -> None:
    model = Model(Fused if "fused" in between else lambda: Layer(between))
    with pytest.raises(ConfigError, match=f"finds no FFN in Model.* {REFUSED[between]}"):
        attach(model, config())
    with pytest.raises(ConfigError, match=f"layers.0.up, one matrix 16 -> 24: {REFUSED[between]}"):
        attach(model, config("layers.*.up"))
    assert not any(isinstance(part, Block | GatheredFFN) for part in model.modules())


def test_dropped_activations() -> None:
    model = Model(lambda: Layer("dropout"))
    assert gathered(model.layers[0]) == [("up", "gate", "down")]
    for layer in model.layers:
        layer.p = 0.1
    with pytest.raises(ConfigError, match="Layer drops activations between up and down; set that probability to 0"):
        attach(model, config())


def test_a_norm_between_the_matrices() -> None:
    """The hidden units do not add up: such FFNs are not found, and can be named for whole copies."""
    model = Model(lambda: Layer("a norm"))
    with pytest.raises(ConfigError, match="finds no FFN"):
        find_ffns(model)
    with pytest.raises(ConfigError, match="cannot narrow layers.0.up"):
        attach(model, config("layers.*.up", expert={"kind": "lora"}))
    model = Model(lambda: Layer("a norm"))
    before = outputs(model)
    attach(model, config("layers.*.up"))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))


def test_wrong_names() -> None:
    with pytest.raises(ConfigError, match="layers.0.down, one matrix 24 -> 16: name up, the first of up and down"):
        attach(Model(Layer), config("layers.*.down"))
    with pytest.raises(ConfigError, match=r"layers.0 \(Layer\), a layer .* name the first of them, layers.0.up"):
        attach(Model(Layer), config("layers.*"))
    with pytest.raises(ConfigError, match=r"matches no module of the model. FFNs in this model: layers.0.up"):
        attach(Model(Layer), config("layers.*.mlp"))


class Second(Layer):
    """Needs what nobody gives it."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return super().forward(x) + memory.mean()


def test_a_layer_that_cannot_be_run_alone() -> None:
    with pytest.raises(ConfigError, match="Second, with .*, cannot be run alone: 'NoneType' object"):
        find_ffns(Model(Second))


@pytest.mark.parametrize("activation", [nn.functional.relu, nn.GELU()])
def test_layers_of_torch(activation: Any) -> None:
    model = Model(lambda: nn.TransformerEncoderLayer(D, 2, F, activation=activation))
    with pytest.raises(ConfigError, match=r"TransformerEncoderLayer.forward reads self.linear1.weight itself"):
        attach(model, config())


OF_BART = {"d_model": D, "decoder_ffn_dim": F, "decoder_layers": 2, "decoder_attention_heads": 2}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({"hidden_size": D, "ffn_dim": F, "num_hidden_layers": 2, "num_attention_heads": 2}, "model.decoder"),
    "xglm": ({"d_model": D, "ffn_dim": F, "num_layers": 2, "attention_heads": 2}, "model"),
    "biogpt": ({"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2}, "biogpt"),
    "bart": ({**OF_BART, "is_decoder": True, "is_encoder_decoder": False}, "model.decoder"),
}


@pytest.mark.parametrize("after", [False, True], ids=["", "norms after"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, after: bool) -> None:
    """Whole logits, with dropout outside of the FFNs, flattened features (OPT), and without weights."""
    values, path = MODELS[name]
    more = {"do_layer_norm_before": not after, "word_embed_proj_dim": 8} if name == "opt" else {}
    torch.manual_seed(0)
    made = AutoConfig.for_model(name, vocab_size=64, use_cache=False, **values, **more)
    model, ids = AutoModelForCausalLM.from_config(made), torch.randint(3, 64, (2, 9))
    before = []
    for training in (False, True):
        torch.manual_seed(1)
        before.append(model.train(training)(input_ids=ids).logits)
    assert not torch.equal(*before), "something is dropped"
    blocks = attach(model, config())
    assert [block.name for block in blocks] == [f"{path}.layers.{i}.fc1" for i in range(2)]
    for training in (False, True):
        torch.manual_seed(1)
        assert torch.equal(model.train(training)(input_ids=ids).logits, before[training])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(made)
    assert [block.name for block in attach(empty, config())] == [block.name for block in blocks]
    assert loose_ffns(blocks[0].dense) != [], "what was gathered has the shape still"
