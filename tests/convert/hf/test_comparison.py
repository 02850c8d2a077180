"""The comparison behind an export fails where anything is lost, swapped or changed, and says what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytest import MonkeyPatch, fixture, mark, raises
from safetensors.torch import load_file, save_file

from mocte_ds.convert.hf import mixture
from mocte_ds.convert.hf.families import Family
from mocte_ds.convert.hf.families.mixtral import Mixtral
from mocte_ds.convert.hf.trained_check import compare_logits
from mocte_ds.errors import CheckpointError
from tests.checkpoints import tiny
from tests.checkpoints.held import HeldSource, write

ALL = "model.layers.*.mlp"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@fixture
def model() -> Any:
    """A Llama with experts that Mixtral has."""
    model = tiny.decoder()
    tiny.add_blocks(model, ALL, router={"bias": False})
    return model


def swap(one: str, other: str) -> Callable[[dict], None]:
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
        (lambda weights: weights.pop(EXPERT.format(2, 1)), "experts.2.w1.weight was lost or changed"),
        (swap_experts, "experts.0.w1.weight was lost or changed"),
        (swap(EXPERT.format(1, 1), EXPERT.format(1, 3)), "experts.1.w1.weight was lost or changed"),
        (smallest_change, "experts.2.w2.weight was lost or changed"),
        (swap_gate_rows, "layers.1.block_sparse_moe.gate.weight was lost or changed"),
        (lambda weights: weights.pop("lm_head.weight"), "lm_head.weight was lost"),
        (lambda weights: weights.update({GATE: torch.zeros(5, 32)}), "gate.weight was lost or changed"),
        (lambda weights: weights.update({GATE: weights[GATE].double()}), "gate.weight was lost or changed"),
        (lambda weights: weights.update(more=torch.zeros(3)), "could not load everything of .*more"),
    ],
)
def test_files_that_change_on_their_way(
    model: Any, tmp_path: Path, monkeypatch: MonkeyPatch, change: Callable[[dict], None], message: str
) -> None:
    right = mixture.write_shards

    def wrong(folder: Path, *given: Any) -> None:
        right(folder, *given)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    assert write(model, tmp_path / "right")["experts_compared"] == 12
    monkeypatch.setattr(mixture, "write_shards", wrong)
    with raises(CheckpointError, match=message):
        write(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@mark.parametrize("wrong", ["order of experts", "gate and up", "a lost expert", "rows of a gate", "a final norm"])
def test_a_map_of_tensors_that_is_wrong(model: Any, tmp_path: Path, monkeypatch: MonkeyPatch, wrong: str) -> None:
    """The files hold what the map says; only the function shows it."""
    right = Family.pairs

    def pairs(self: Family, run: Any) -> list[Any]:
        found = {pair.theirs: pair for pair in right(self, run)}
        layer = "model.layers.2.block_sparse_moe."

        def exchange(one: str, other: str, both: bool = True) -> None:
            first, second = found[layer + one], found[layer + other]
            ours = first.ours
            object.__setattr__(first, "ours", second.ours)
            if both:
                object.__setattr__(second, "ours", ours)

        if wrong == "gate and up":
            exchange("experts.0.w1.weight", "experts.0.w3.weight")
        elif wrong == "rows of a gate":
            object.__setattr__(found[f"{layer}gate.weight"], "make", lambda rows, *_: rows.flip(0))
        elif wrong == "a final norm":
            object.__setattr__(found["model.norm.weight"], "make", lambda weight: weight + 0.1)
        else:
            for part in (1, 2, 3):
                exchange(f"experts.0.w{part}.weight", f"experts.3.w{part}.weight", both=wrong == "order of experts")
        return list(found.values())

    monkeypatch.setattr(Family, "pairs", pairs)
    with raises(CheckpointError, match="logits differ from the trained model's"):
        write(model, tmp_path / "out")


@mark.parametrize(("key", "value"), [("rms_norm_eps", 0.5), ("num_experts_per_tok", 2), ("sliding_window", 5)])
def test_a_config_that_computes_something_else(
    model: Any, tmp_path: Path, monkeypatch: MonkeyPatch, key: str, value: Any
) -> None:
    right = Mixtral.config_to
    monkeypatch.setattr(Mixtral, "config_to", lambda self, run: {**right(self, run), key: value})
    with raises(CheckpointError, match="logits differ from the trained model's"):
        write(model, tmp_path / "out")


def test_files_that_are_damaged_later(model: Any, tmp_path: Path) -> None:
    write(model, tmp_path / "out")
    path, source = tmp_path / "out" / "model.safetensors", HeldSource(model)
    assert compare_logits(source, path.parent) < 1e-5
    path.write_bytes(path.read_bytes()[:-100])
    with raises(CheckpointError, match="transformers cannot load"):
        compare_logits(source, path.parent)
    path.unlink()
    with raises(CheckpointError, match="transformers cannot load"):
        compare_logits(source, path.parent)


def test_a_gate_that_leaves_the_choice_to_rounding(model: Any, tmp_path: Path) -> None:
    """Equal rows: either expert is right for a tie, and the class may choose another one than we do."""
    gate = model.model.layers[0].mlp.banks[0].gate
    gate.key.cluster_weight[1:] = gate.key.cluster_weight[0]
    with raises(CheckpointError, match="some gate has experts with the same row"):
        write(model, tmp_path / "out")


def test_a_map_that_promises_another_shape(model: Any, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    right = Family.pairs

    def pairs(self: Family, run: Any) -> list[Any]:
        found = right(self, run)
        object.__setattr__(found[0], "shape", (5, 32))
        return found

    monkeypatch.setattr(Family, "pairs", pairs)
    with raises(CheckpointError, match=r"embed_tokens.weight is \(96, 32\).*\(5, 32\) .* was expected"):
        write(model, tmp_path / "out")
