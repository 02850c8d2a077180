"""Imports have a model in memory once, with and without experts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from mocte_ds.convert.hf.shards import Entry, write_shards
from tests.convert.hf.test_import import VOCAB, write_folder

ROOT = Path(__file__).resolve().parents[3]
# What the import adds to the memory of a process that has imported everything.
MEASURE = """
import sys
from mocte_ds.convert.hf.imported import import_hf
folder = sys.argv[1]
import_hf(folder + "/small", folder + "/small start")
facts = import_hf(folder + "/large", folder + "/large start")
print(facts["parameters"], facts["weight_bytes"], facts["start_bytes"], facts["peak_bytes"])
"""
COMMON = {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES = {
    "small": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "large": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 32},
}


def write_large(folder: Path, small: Path, config: PreTrainedConfig) -> int:
    """A folder of random bf16 weights, written one at a time; their number."""
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if not path.endswith("mlp.experts"):
            shapes[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tuple(parameter.shape)
            continue
        # The class joins its experts; files have a matrix each.
        for k, matrix in enumerate(parameter):
            prefix = f"{path.replace('.mlp.', '.block_sparse_moe.')}.{k}"
            if last == "down_proj":
                shapes[f"{prefix}.w2.weight"] = tuple(matrix.shape)
            else:
                half = (matrix.shape[0] // 2, matrix.shape[1])
                shapes |= {f"{prefix}.w1.weight": half, f"{prefix}.w3.weight": half}
    generator = torch.Generator().manual_seed(0)

    def fill(name: str) -> torch.Tensor:
        return (0.05 * torch.randn(shapes[name], generator=generator) + ("norm" in name)).bfloat16()

    write_shards(folder, [Entry(name, shape, torch.bfloat16) for name, shape in shapes.items()], fill, 50_000_000)
    config.dtype = "bfloat16"
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(small / name, folder / name)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_memory_is_that_of_one_model_in_fp32(kind: str, tmp_path: Path) -> None:
    def config(size: str) -> PreTrainedConfig:
        if kind == "llama":
            return LlamaConfig(**COMMON, **SIZES[size], eos_token_id=0)
        width = SIZES[size]["intermediate_size"] // 4
        values = {**COMMON, **SIZES[size], "intermediate_size": width, "num_local_experts": 4}
        return MixtralConfig(**values, num_experts_per_tok=2, eos_token_id=0)

    write_folder(tmp_path / "small", config("small"))
    parameters = write_large(tmp_path / "large", tmp_path / "small", config("large"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        # glibc keeps freed blocks of less than 32 MB, as all of these are, unless it is told not to.
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted, stored, start, peak = map(int, done.stdout.split()[-4:])
    assert counted == parameters and stored == 2 * parameters > 200e6
    added = peak - start
    print(f"{kind}: {added / 1e6:.0f} MB added for {stored / 1e6:.0f} MB of bf16")
    # In memory are one side at a time, in fp32, which is 2 * stored, and the files as they are mapped.
    assert added < 1.8 * 2 * stored
    assert json.loads((tmp_path / "large start" / "import.json").read_text())["parameters"] == parameters
