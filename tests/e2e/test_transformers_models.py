"""Runs of launch/pretrain.py that train models of transformers, from a config and from a folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mocte_ds.convert.hf.export import export
from mocte_ds.data import validation_batches
from tests.e2e.conftest import LIMIT, ROOT, Launcher, read_log
from tests.e2e.test_init import CONTEXT, first_loss

STEPS, STOP, SEQUENCES = 8, 5, 3
FREEZE = {"alpha": 1e9, "beta": 1e9, "checks": 1, "after_checks": 1, "rows": 16, "iterations": 4}
"""Every expert that can be measured."""
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "phi3": {},
    "opt": {"intermediate_size": None, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def write_run(path: Path, model: dict[str, Any], run_file: Callable[[bool], Path], blocks: bool = True) -> Path:
    values = yaml.safe_load(run_file(blocks).read_text(encoding="utf-8"))
    values["model"] = model
    values["training"] |= {"steps": STEPS, "context": CONTEXT, "checkpoint_every": 5}
    values["evaluation"] = {"every": STEPS, "sequences_per_domain": SEQUENCES}
    values["deepspeed"]["bf16"]["enabled"] = False
    if blocks:
        values["deepspeed"]["mocte"] |= {"freeze": FREEZE, "modules": "auto"}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def hf(kind: str) -> dict[str, Any]:
    values = {"model_type": kind, "vocab_size": 304, "max_position_embeddings": 64, **SIZES, **MODELS[kind]}
    return {"hf": {key: value for key, value in values.items() if value is not None}}


@torch.no_grad()
def validation(folder: Path, data: Path) -> dict[str, float]:
    """Loss of each domain, by transformers."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    for domain, (ids, labels) in validation_batches(data, CONTEXT, SEQUENCES, None).items():
        found[domain] = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    return found


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_model_from_its_config(
    kind: str, launch: Launcher, prepared: Path, run_file: Callable[[bool], Path], tmp_path: Path
) -> None:
    """It trains, experts emerge and freeze, it stops and goes on, and the export gives the same losses."""
    run, out = write_run(tmp_path / "run.yaml", hf(kind), run_file), tmp_path / "run"
    for more in [("--stop-after", STOP), ()]:
        code, output = launch.pretrain(run, out, *more)
        assert code == 0, output
    log, events = read_log(out), read_log(out, "events")
    assert [row["step"] for row in log] == list(range(1, STEPS + 1)) and log[-1]["loss"] < log[0]["loss"]
    assert {"emergence", "freeze"} <= {event["event"] for event in events}
    assert [event["step"] for event in events if event["event"] == "resume"] == [STOP]
    facts = export(out / "checkpoints", tmp_path / "export")
    wanted = "Qwen3MoeForCausalLM" if kind == "qwen3" else "MocteBlocksForCausalLM"
    assert facts["architecture"] == wanted and facts["logit_difference"] < 1e-5
    found = validation(tmp_path / "export", prepared)
    assert found == {domain: pytest.approx(log[-1]["validation"][domain], abs=1e-4) for domain in found}
    # Texts end as the tokenizer says, though the class has other defaults.
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_a_dense_run_and_runs_that_start_from_it(
    launch: Launcher, prepared: Path, run_file: Callable[[bool], Path], tmp_path: Path
) -> None:
    model = {"hf": {**hf("qwen3")["hf"], "model_type": "llama"}, "activation_checkpointing": True}
    code, output = launch.pretrain(write_run(tmp_path / "dense.yaml", model, run_file, False), tmp_path / "dense")
    assert code == 0, output
    assert export(tmp_path / "dense" / "checkpoints", tmp_path / "export")["architecture"] == "LlamaForCausalLM"
    expected = first_loss(tmp_path / "export", prepared)
    tool = [sys.executable, "tools/to_megatron.py", tmp_path / "dense" / "checkpoints", tmp_path / "megatron"]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    for name, start in (("pretrained", tmp_path / "export"), ("init", tmp_path / "dense" / "checkpoints")):
        run = write_run(tmp_path / f"{name}.yaml", {name: str(start)}, run_file)
        code, output = launch.pretrain(run, tmp_path / name, "--stop-after", 1)
        assert code == 0, output
        assert read_log(tmp_path / name)[0]["loss"] == pytest.approx(expected, abs=1e-4), name
