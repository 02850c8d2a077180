"""Runs of launch/pretrain.py that start from imported models: the first loss is the imported model's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mocte_ds.convert.hf.export import export
from mocte_ds.convert.hf.imported import import_hf
from mocte_ds.data import BlendedLoader, prepare
from tests.convert.hf.test_import import CONFIGS, write_folder
from tests.convert.hf.test_mixtures import CASES
from tests.e2e.conftest import Launcher, read_log

BATCH, CONTEXT, MICRO = 16, 32, 4


def write_run(path: Path, start: Path, data: Path, run_file: Callable[[bool], Path], kept: dict[str, Any]) -> Path:
    values = yaml.safe_load(run_file(True).read_text(encoding="utf-8"))
    values["model"] = {"init": str(start)}
    values["data"]["prepared"] = str(data)
    values["training"] |= {"steps": 8, "context": CONTEXT, "learning_rate": 3e-3}
    values["deepspeed"]["bf16"]["enabled"] = False
    values["deepspeed"]["mocte"] |= kept
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@torch.no_grad()
def first_loss(folder: Path, data: Path) -> float:
    """Of the first global batch, by transformers."""
    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for rank in range(2):
        batches = iter(BlendedLoader(data, "train", CONTEXT, BATCH, rank, 2, MICRO, 0, None))
        for _ in range(BATCH // (2 * MICRO)):
            batch = next(batches)
            logits = model(batch["input_ids"]).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["llama", "mixtral, 2", "glm4moe, 2"])
def test_training_from_an_import(
    name: str, launch: Launcher, prepared: Path, run_file: Callable[[bool], Path], tmp_path: Path
) -> None:
    mixture = name in CASES
    source = write_folder(tmp_path / "folder", CASES[name][0] if mixture else CONFIGS[name])
    facts = import_hf(source, tmp_path / "start")
    data, out = tmp_path / "data", tmp_path / "run"
    corpus = prepared.parent / "corpus"
    prepare(corpus, data, tmp_path / "start" / "tokenizer", validation_share=0.2, workers=1, progress=False)
    kept = {key: facts["mocte"][key] for key in ("modules", "num_experts", "expert", "router")} if mixture else {}
    run = write_run(tmp_path / "run.yaml", tmp_path / "start", data, run_file, kept)
    code, output = launch.pretrain(run, out, "--stop-after", 5)
    assert code == 0, output
    code, output = launch.pretrain(run, out)
    assert code == 0, output
    log, events = read_log(out), read_log(out, "events")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert log[0]["loss"] == pytest.approx(first_loss(source, data), abs=1e-4)
    # A resumed run goes on from its own weights.
    assert max(row["loss"] for row in log[5:]) < log[0]["loss"] - 0.2
    if mixture:
        assert sum(log[0]["expert_load"][0]) == 2 * BATCH * CONTEXT
    else:
        assert log[0]["expert_load"] == [[0] * 4] * 2 and any(event["event"] == "emergence" for event in events)
    exported = export(out / "checkpoints", tmp_path / "back")
    assert exported["architecture"] == ("Glm4MoeForCausalLM" if "glm" in name else "MixtralForCausalLM")
    stored = json.loads((tmp_path / "back" / "config.json").read_text())
    assert stored["num_experts_per_tok"] == (2 if mixture else 1)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_experts_that_do_not_fit(
    launch: Launcher, prepared: Path, run_file: Callable[[bool], Path], tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "folder", CASES["mixtral, 2"][0])
    import_hf(source, tmp_path / "start")
    data = tmp_path / "data"
    tokenizer = tmp_path / "start" / "tokenizer"
    prepare(prepared.parent / "corpus", data, tokenizer, validation_share=0.2, workers=1, progress=False)
    run = write_run(tmp_path / "run.yaml", tmp_path / "start", data, run_file, {})
    code, output = launch.pretrain(run, tmp_path / "run")
    assert code != 0 and "has other experts than the run: mocte.router" in output, output
    code, output = launch.pretrain(run, tmp_path / "run", "--set", "deepspeed.mocte=null")
    assert code != 0 and "has experts, and the run has none" in output, output
    code, output = launch.pretrain(run, tmp_path / "run", "--set", "deepspeed.zero_optimization.stage=3")
    assert code != 0 and "zero_optimization.stage is 3" in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()
