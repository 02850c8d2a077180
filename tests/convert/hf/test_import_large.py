"""Imports need no more memory for more layers, dense, with experts that are kept, and with experts that emerge."""

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
# What imports of few and of many layers add to the memory of a process that has imported everything.
MEASURE = """
import json, sys
from mocte_ds.benchmark.measure.memory import Peak
from mocte_ds.convert.hf.imported import import_hf
folder, emerge = sys.argv[1], sys.argv[2] == "emerged"
with open(folder + "/mocte.json") as file:
    more = {"corpus": folder + "/corpus", "settings": json.load(file), "context": 48} if emerge else {}
import_hf(folder + "/small", folder + "/small start", **more)
for size in ("few", "many"):
    peak = Peak()
    facts = import_hf(folder + "/" + size, folder + "/" + size + " start", **more)
    print(facts["parameters"], facts["weight_bytes"], peak.to_dict()["added_bytes"])
"""
SPECTRUM = {"rows": 64, "documents": 16, "doublings": 0}
"""A small sample: every block keeps one."""
COMMON = {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES = {
    "small": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "few": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2},
    "many": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
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


@pytest.mark.parametrize("kind", ["llama", "emerged", "mixtral"])
def test_memory_does_not_grow_with_layers(kind: str, tmp_path: Path) -> None:
    def config(size: str) -> PreTrainedConfig:
        if kind != "mixtral":
            return LlamaConfig(**COMMON, **SIZES[size], eos_token_id=0)
        width = SIZES[size]["intermediate_size"] // 4
        values = {**COMMON, **SIZES[size], "intermediate_size": width, "num_local_experts": 4}
        return MixtralConfig(**values, num_experts_per_tok=2, eos_token_id=0)

    write_folder(tmp_path / "small", config("small"))
    parameters = [write_large(tmp_path / size, tmp_path / "small", config(size)) for size in ("few", "many")]
    (tmp_path / "corpus").mkdir()
    for domain, text in {"cats": "the cat sat on the mat ", "numbers": "1 2 3 5 8 13 21 34 "}.items():
        lines = [json.dumps({"text": f"{text * 6}{i} {text * (i % 5)}"}) for i in range(80)]
        (tmp_path / "corpus" / f"{domain}.jsonl").write_text("\n".join(lines))
    block = {"modules": "model.layers.*.mlp", "num_experts": 4, "router": {"kind": "token"}, "spectrum": SPECTRUM}
    (tmp_path / "mocte.json").write_text(json.dumps(block))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        # glibc keeps freed blocks of less than 32 MB, as all of these are, unless it is told not to.
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    few, many = ([int(word) for word in line.split()] for line in done.stdout.splitlines()[-2:])
    assert [few[0], many[0]] == parameters and many[1] == 2 * parameters[1]
    more = many[1] - few[1]
    assert more > 40e6
    print(f"{kind}: {few[2] / 1e6:.0f} and {many[2] / 1e6:.0f} MB added for {few[1] / 1e6:.0f} and {many[1] / 1e6:.0f}")
    assert many[2] - few[2] < more / 4
    # Weights are read and written layer by layer: a layer in fp32, and as much again for copies and mapped pages.
    assert many[2] < many[1] * 1.5
    written = json.loads((tmp_path / "many start" / "import.json").read_text())
    assert written["parameters"] == parameters[1] and bool(written.get("clusters")) == (kind == "emerged")
