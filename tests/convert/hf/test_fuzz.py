"""A few seconds of the fuzzer of folders (python -m tests.convert.hf.fuzz runs it for long), and what it found."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mocte_ds.convert.hf.imported import import_hf
from mocte_ds.errors import MocteError
from mocte_ds.evaluation.network import load_network
from tests.convert.hf.fuzz import fuzz, write_folders


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_folders_are_refused_or_unharmed(seed: int, tmp_path: Path) -> None:
    counts, failures = fuzz(tmp_path, seed, cases=40)
    assert not failures, "\n".join(failures)
    assert counts["evaluate refused"] and counts["import refused"] and sum(counts.values()) == 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("folders"))


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return harm


def flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def deep_header(folder: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan


def no_attention(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.self_attn" in name]:
        del tensors[name]


def long_name(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "é" * 5000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CASES = {
    "a flipped bit": ("llama-ours", flipped, "is not what checksums.json says"),
    "a tensor of an export is missing": ("llama-ours", weights(no_attention), "has no tensor model.layers.1.self_attn"),
    "a config of another class": (
        "llama-ours",
        config(architectures=["MistralForCausalLM"], model_type="mistral"),
        "config.json is not what checksums.json says",
    ),
    "missing tensors": ("llama", weights(no_attention), "has no tensor .*model.layers.1.self_attn"),
    "experts without a place": (
        "mixtral",
        config(architectures=["LlamaForCausalLM"], model_type="llama"),
        "has no tensor",
    ),
    "fewer layers": ("llama", config(num_hidden_layers=1), "model.layers.1"),
    "more layers": ("llama", config(num_hidden_layers=3), "model.layers.2"),
    "20,000 layers": ("llama", config(num_hidden_layers=20_000), "num_hidden_layers = 20000"),
    "1e9 layers": ("mixtral", config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "1e9 experts": ("mixtral", config(num_local_experts=10**9), "num_local_experts = 1000000000"),
    "1e12 features": ("llama", config(hidden_size=10**12), "hidden_size = 1000000000000"),
    "a deep config": ("llama", lambda f: (f / "config.json").write_text("[" * 200_000), "nested too deep"),
    "a deep header": ("llama", deep_header, "model.safetensors cannot be read"),
    "a long dtype": ("llama", config(dtype="é" * 5000), "has no attribute 'éé"),
    "a long model_type": ("llama", config(model_type="é" * 5000), "model type"),
    "a long number": ("llama", config(rope_parameters={"rope_type": "default", "rope_theta": "é" * 5000}), "folder"),
    "a long rope_theta": ("llama", config(rope_theta="é" * 5000, rope_parameters=None), "folder"),
    "a file name that is too long": ("llama", long_name, "which is not a file of the folder"),
    "a number with 400 digits": ("llama", config(intermediate_size=10**400), "intermediate_size = a number of more"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reader", ["evaluate", "import"])
def test_what_the_fuzzer_found(case: str, reader: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name, harm, told = CASES[case]
    folder = tmp_path / "folder"
    shutil.copytree(folders[name], folder)
    harm(folder)
    with pytest.raises(MocteError, match=told) as caught:
        load_network(folder) if reader == "evaluate" else import_hf(folder, tmp_path / "out")
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("window", [0, -1, 2**63])
def test_a_window_that_no_model_runs_with(window: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """It fits the weights: only a call shows it."""
    shutil.copytree(folders["mixtral"], tmp_path / "folder")
    config(sliding_window=window)(tmp_path / "folder")
    with pytest.raises(MocteError, match="cannot run it, its config is damaged"):
        load_network(tmp_path / "folder")


def test_numbers_that_are_not_finite(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "folder")
    weights(not_finite)(tmp_path / "folder")
    with pytest.raises(MocteError, match="model.layers.1.mlp.up_proj.weight holds numbers that are not finite"):
        load_network(tmp_path / "folder")


def test_a_tokenizer_of_an_export_is_held_against_its_checksum(folders: dict[str, Path], tmp_path: Path) -> None:
    from mocte_ds.data.stored_tokenizer import open_tokenizer

    shutil.copytree(folders["llama-ours"], tmp_path / "folder")
    open_tokenizer(tmp_path / "folder")
    path = tmp_path / "folder" / "tokenizer.json"
    path.write_text(path.read_text().replace('"c"', '"C"'))
    with pytest.raises(MocteError, match="tokenizer.json is not what checksums.json says"):
        open_tokenizer(tmp_path / "folder")
