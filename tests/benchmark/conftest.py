"""Small run files, and the tool as it is called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.benchmark import main

STEPS, BATCH, CONTEXT, CHECK_EVERY = 100, 256, 32, 0.05
QUICK = ["--device", "cpu", "--gemm-size", "64", "--repeats", "1", "--ranks", "2", "--json"]
RUN = f"""
model: {{preset: quickstart, vocab_size: 64, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3,
        num_attention_heads: 2, max_position_embeddings: {CONTEXT}}}
data: {{prepared: nowhere}}
training: {{steps: {STEPS}, batch_tokens: {BATCH}, micro_batch: 2}}
deepspeed:
  bf16: {{enabled: true}}
  mocte:
    modules: "model.layers.[12].mlp"
    num_experts: 4
    ep_size: 2
    check_every: {CHECK_EVERY}
    spectrum: {{rank: 4, rows: 64, documents: 48}}
    freeze: {{rows: 16, iterations: 3}}
"""


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two blocks in three layers."""
    path = tmp_path_factory.mktemp("runs") / "tiny.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


@pytest.fixture
def benchmark_json(run_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Calls the tool with --json; nothing but the object stands on stdout."""

    def call(*arguments: Any) -> dict[str, Any]:
        capsys.readouterr()
        command = [*map(str, arguments), *QUICK, "--small", str(run_file), "--large", str(run_file)]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)

    return call
