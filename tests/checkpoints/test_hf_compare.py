"""The comparison behind an export fails where anything is lost, swapped or changed, and says what."""

from dataclasses import replace

import torch
from pytest import fixture, mark, raises
from safetensors import safe_open
from safetensors.torch import save_file

from mocte_ds.checkpoints.hf import experts as builders
from mocte_ds.checkpoints.hf.compare import compare
from mocte_ds.checkpoints.hf.dense import SpecialIds
from mocte_ds.checkpoints.hf.export import write_model
from mocte_ds.checkpoints.hf.layouts import choose_layout
from mocte_ds.errors import CheckpointError
from mocte_ds.moe import BlockMode
from tests.checkpoints import tiny

NONE = SpecialIds(None, None, None)
ALL = "model.layers.*.mlp"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@fixture
def export(tmp_path):
    """A Mixtral as it was written: model, layout, folder."""
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    layout = choose_layout(model, NONE)
    write_model(layout, tmp_path, "fp32")
    return model, layout, tmp_path


def tamper(folder, change) -> None:
    """Rewrite the weights of an export."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    change(weights)
    save_file(weights, path, {"format": "pt"})


def swap(one: str, other: str):
    """A change that lets two tensors change places."""

    def change(weights: dict) -> None:
        weights[one], weights[other] = weights[other], weights[one]

    return change


def swap_experts(weights: dict) -> None:
    for part in (1, 2, 3):
        swap(EXPERT.format(0, part), EXPERT.format(3, part))(weights)


def smallest_change(weights: dict) -> None:
    row = weights[EXPERT.format(2, 2)][0]
    row[5] = torch.nextafter(row[5], torch.tensor(9.0))


def swap_gate_rows(weights: dict) -> None:
    weights[GATE] = weights[GATE][[0, 2, 1, 3]].contiguous()


@mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: None, None),
        (lambda weights: weights.pop(EXPERT.format(2, 1)), r"cannot load|not load everything|gate_up_proj was lost"),
        (
            lambda weights: [weights.pop(EXPERT.format(2, part)) for part in (1, 2, 3)],
            "cannot load|everything|was lost",
        ),
        (swap_experts, "layers.1.mlp.experts.gate_up_proj was lost or changed"),
        (swap(EXPERT.format(1, 1), EXPERT.format(1, 3)), "layers.1.mlp.experts.gate_up_proj was lost or changed"),
        (smallest_change, "layers.1.mlp.experts.down_proj was lost or changed"),
        (swap_gate_rows, "layers.1.mlp.gate.weight was lost or changed"),
        (lambda weights: weights.pop("lm_head.weight"), "lm_head"),
        (lambda weights: weights.update(more=torch.zeros(3)), "more"),
        (lambda weights: weights.update({GATE: torch.zeros(5, 32)}), "cannot load"),
    ],
)
def test_files_that_changed(export, change, message):
    model, layout, folder = export
    tamper(folder, change)
    if message is None:
        assert compare(model, layout, folder, "fp32")["experts_compared"] == 12
        return
    with raises(CheckpointError, match=message):
        compare(model, layout, folder, "fp32")


def test_truncated_and_missing_files(export):
    model, layout, folder = export
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with raises(CheckpointError, match="transformers cannot load"):
        compare(model, layout, folder, "fp32")
    path.unlink()
    with raises(CheckpointError, match="transformers cannot load"):
        compare(model, layout, folder, "fp32")


@mark.parametrize("wrong", ["order of experts", "gate and up", "a lost expert"])
def test_mistakes_of_our_own_builders(tmp_path, monkeypatch, wrong):
    """The file holds what the layout says, but the layout is wrong."""
    right = builders._stacked

    def stacked(prefix: str, block) -> dict[str, torch.Tensor]:
        weights = right(prefix, block)
        if not prefix.startswith("model.layers.2"):
            return weights
        for name, tensor in weights.items():
            if wrong == "order of experts":
                weights[name] = tensor.flip(0)
            elif wrong == "a lost expert":
                weights[name] = tensor[[0, 1, 1, 3]]
            elif name.endswith("gate_up_proj"):
                weights[name] = tensor.roll(tensor.shape[1] // 2, dims=1)
        return weights

    monkeypatch.setattr(builders, "_stacked", stacked)
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    layout = choose_layout(model, NONE)
    write_model(layout, tmp_path, "fp32")
    with raises(CheckpointError, match=r"of expert \d of model.layers.2.mlp is not the trained one"):
        compare(model, layout, tmp_path, "fp32")


def test_gate_rows_in_another_order_than_the_experts(tmp_path):
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    layout = choose_layout(model, NONE)
    name = "model.layers.0.mlp.gate.weight"
    wrong = replace(layout, weights={**layout.weights, name: layout.weights[name].flip(0)})
    write_model(wrong, tmp_path, "fp32")
    with raises(CheckpointError, match="the outputs of model.layers.0.mlp differ"):
        compare(model, wrong, tmp_path, "fp32")


def test_a_config_that_computes_something_else(tmp_path):
    model = tiny.decoder()
    layout = choose_layout(model, NONE)

    def make() -> torch.nn.Module:
        stock = layout.make()
        stock.config.rope_parameters["rope_theta"] = 10000.0
        return stock

    write_model(replace(layout, make=make), tmp_path, "fp32")
    with raises(CheckpointError, match="logits differ from the trained model's"):
        compare(model, layout, tmp_path, "fp32")


def test_a_class_without_the_experts(tmp_path):
    model = tiny.decoder()
    block = tiny.add_blocks(model, "model.layers.1.mlp", router={"bias": False})[0]
    block.mode = BlockMode.WARMUP
    layout = choose_layout(model, NONE)
    write_model(layout, tmp_path, "fp32")
    block.mode = BlockMode.LOCKED
    with raises(CheckpointError, match=r"the experts of \['model.layers.1.mlp'\] are not there"):
        compare(model, layout, tmp_path, "fp32")


def test_a_gate_that_leaves_the_choice_to_rounding(tmp_path):
    """Equal rows: either expert is right for a tie, and the class may choose another one than we do."""
    model = tiny.decoder()
    blocks = tiny.add_blocks(model, ALL, router={"bias": False})
    gate = blocks[0].banks[0].gate
    gate.key.cluster_weight[1:] = gate.key.cluster_weight[0]
    layout = choose_layout(model, NONE)
    write_model(layout, tmp_path, "fp32")
    with raises(CheckpointError, match="some gate has experts with the same row"):
        compare(model, layout, tmp_path, "fp32")


def test_a_layout_that_the_class_does_not_take(export, tmp_path):
    _, layout, _ = export
    some = dict(layout.weights)
    some.pop("model.layers.0.mlp.experts.down_proj")
    with raises(CheckpointError, match="MixtralForCausalLM does not take this model: missing"):
        write_model(replace(layout, weights=some), tmp_path / "a", "fp32")
    with raises(CheckpointError, match="does not take this model"):
        write_model(replace(layout, weights={**layout.weights, GATE: torch.zeros(4)}), tmp_path / "b", "fp32")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
