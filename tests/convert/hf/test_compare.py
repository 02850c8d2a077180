"""The comparison behind an export fails where anything is lost, swapped or changed, and says what."""

import json
from dataclasses import replace

import torch
from pytest import fixture, mark, raises
from safetensors import safe_open
from safetensors.torch import save_file

from mocte_ds.convert.hf import experts as builders
from mocte_ds.convert.hf.compare import compare
from mocte_ds.convert.hf.export import write_model
from mocte_ds.convert.hf.layouts import choose_layout
from mocte_ds.errors import CheckpointError
from mocte_ds.moe import BlockMode
from tests.checkpoints import tiny
from tests.checkpoints.held import NONE, HeldSource, facts_of, stored

ALL = "model.layers.*.mlp"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@fixture
def export(tmp_path):
    """A Mixtral as it was written: source, layout, folder."""
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    return *stored(model, tmp_path), tmp_path


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
        (lambda weights: weights.pop(EXPERT.format(2, 1)), "experts.2.w1.weight was lost or changed"),
        (swap_experts, "experts.0.w1.weight was lost or changed"),
        (swap(EXPERT.format(1, 1), EXPERT.format(1, 3)), "experts.1.w1.weight was lost or changed"),
        (smallest_change, "experts.2.w2.weight was lost or changed"),
        (swap_gate_rows, "layers.1.block_sparse_moe.gate.weight was lost or changed"),
        (lambda weights: weights.pop("lm_head.weight"), "lm_head.weight was lost"),
        (lambda weights: weights.update(more=torch.zeros(3)), "holds more, which MixtralForCausalLM does not have"),
        (lambda weights: weights.update({GATE: torch.zeros(5, 32)}), "gate.weight was lost or changed"),
        (lambda weights: weights.update({GATE: weights[GATE].double()}), "gate.weight was lost or changed"),
    ],
)
def test_files_that_changed(export, change, message):
    source, layout, folder = export
    tamper(folder, change)
    if message is None:
        assert compare(source, layout, folder)[0]["experts_compared"] == 12
        return
    with raises(CheckpointError, match=message):
        compare(source, layout, folder)


def test_truncated_and_missing_files(export):
    source, layout, folder = export
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with raises(CheckpointError, match="model.safetensors cannot be read"):
        compare(source, layout, folder)
    path.unlink()
    with raises(CheckpointError, match="model.safetensors is missing"):
        compare(source, layout, folder)


@mark.parametrize("wrong", ["order of experts", "gate and up", "a lost expert"])
def test_mistakes_of_our_own_builders(tmp_path, monkeypatch, wrong):
    """The file holds what the layout says, but the layout is wrong."""
    right = builders._experts

    def experts(source, block, prefix: str, parts=None) -> list:
        entries = right(source, block, prefix, parts)
        if not prefix.startswith("model.layers.2"):
            return entries
        order = list(range(len(entries)))
        if wrong == "order of experts":
            order = [9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2]
        elif wrong == "a lost expert":
            order[6:9] = order[3:6]
        else:
            order[0], order[1] = 1, 0
        return [replace(entry, sources=entries[n].sources) for entry, n in zip(entries, order, strict=True)]

    monkeypatch.setattr(builders, "_experts", experts)
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    with raises(CheckpointError, match=r"of expert \d of model.layers.2.mlp is not the trained one"):
        facts_of(model, tmp_path)


def test_gate_rows_in_another_order_than_the_experts(tmp_path):
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    source = HeldSource(model)
    layout = choose_layout(source, NONE)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    flipped = [replace(s, make=lambda rows: rows.flip(0)) if s.name == name else s for s in layout.stored]
    wrong = replace(layout, stored=flipped)
    write_model(source, wrong, tmp_path)
    with raises(CheckpointError, match="the outputs of model.layers.0.mlp differ"):
        compare(source, wrong, tmp_path)


@mark.parametrize(
    ("field", "value", "message"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}, "the features behind layer 0 differ"),
        ("rms_norm_eps", 0.5, "the features behind layer 0 differ"),
        ("model_type", "no such model", "transformers cannot load"),
    ],
)
def test_a_config_that_computes_something_else(tmp_path, field, value, message):
    source, layout = stored(tiny.decoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with raises(CheckpointError, match=message):
        compare(source, layout, tmp_path)


def test_a_final_norm_that_differs(tmp_path):
    """Only the ends of the model show it: no layer has it."""
    source, layout = stored(tiny.decoder(), tmp_path)
    entries = [replace(s, make=lambda w: w + 0.1) if s.name == "model.norm.weight" else s for s in layout.stored]
    wrong = replace(layout, stored=entries)
    write_model(source, wrong, tmp_path)
    with raises(CheckpointError, match="logits of the first layer alone differ"):
        compare(source, wrong, tmp_path)


def test_a_class_without_the_experts(tmp_path):
    model = tiny.decoder()
    block = tiny.add_blocks(model, "model.layers.1.mlp", router={"bias": False})[0]
    block.mode = BlockMode.WARMUP
    source, layout = stored(model, tmp_path)
    block.mode = BlockMode.LOCKED
    with raises(CheckpointError, match="the experts of model.layers.1.mlp are not there"):
        compare(source, layout, tmp_path)


def test_a_gate_that_leaves_the_choice_to_rounding(tmp_path):
    """Equal rows: either expert is right for a tie, and the class may choose another one than we do."""
    model = tiny.decoder()
    blocks = tiny.add_blocks(model, ALL, router={"bias": False})
    gate = blocks[0].banks[0].gate
    gate.key.cluster_weight[1:] = gate.key.cluster_weight[0]
    with raises(CheckpointError, match="some gate has experts with the same row"):
        facts_of(model, tmp_path)


def test_a_layout_that_promises_another_shape(tmp_path):
    source = HeldSource(tiny.decoder())
    layout = choose_layout(source, NONE)
    first, *rest = layout.stored
    wrong = replace(layout, stored=[replace(first, shape=(5, 32)), *rest])
    with raises(CheckpointError, match=r"embed_tokens.weight is \(96, 32\).*promised was \(5, 32\)"):
        write_model(source, wrong, tmp_path)
