"""A dense run with `model.bigram`: every ZeRO stage against a plain loop, resume, its checkpoint in use, no export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.convert.hf.export import export
from mocte_ds.data import BlendedLoader, Manifest
from mocte_ds.errors import CheckpointError
from mocte_ds.evaluation.live import load_live
from mocte_ds.evaluation.replicas import Replicas
from mocte_ds.training.init import InitialWeights
from mocte_ds.training.model import Forward, make_model
from mocte_ds.training.run_config import read_run
from tests.e2e.conftest import Launcher, read_log
from tests.e2e.test_pretrain import what_is_learned
from tests.training.test_bigrams import logits_by_hand, rows_by_hand

ROWS, STEPS = 101, 8
CHANGES = [f"model.bigram={{rows: {ROWS}, seed: 3}}", "deepspeed.bf16.enabled=false", f"training.steps={STEPS}"]
CHANGES += ["training.checkpoint_every=8", "evaluation.every=4", "training.seed=7"]


def losses_of_a_plain_loop(run: Path, prepared: Path, rates: list[float]) -> list[float]:
    """One process, torch's own AdamW, no engine."""
    config, end = read_run(run, CHANGES), Manifest.read(prepared).eod_id
    torch.manual_seed(config.training.seed)
    model = make_model(config.model, end)
    forward, found = Forward(model, None), []
    groups = [[p for p in model.parameters() if (p.dim() > 1) is decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    batches = iter(BlendedLoader(prepared, "train", 32, 16, 0, 1, 16, config.training.seed, None, verify=None))
    for rate in rates:
        batch = next(batches)
        loss = forward.loss(model(**forward.inputs(batch["input_ids"])), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        found.append(loss.item())
    assert model.bigrams.table.weight.abs().max() > 1e-3
    return found


def test_all_stages_train_the_table_and_resume(
    launch: Launcher, run_file: Callable[[bool], Path], prepared: Path, tmp_path: Path
) -> None:
    run = run_file(False)
    for stage in (1, 2, 3):
        changes = [*CHANGES, f"deepspeed.zero_optimization.stage={stage}"]
        options = [word for change in changes for word in ("--set", change)]
        whole, parts = tmp_path / f"whole{stage}", tmp_path / f"parts{stage}"
        for out, more in ((whole, []), (parts, ["--stop-after", 3]), (parts, [])):
            code, output = launch.pretrain(run, out, *options, *more)
            assert code == 0, output
        assert what_is_learned(parts) == what_is_learned(whole) and len(read_log(parts)) == STEPS
        rows = read_log(whole)
        expected = losses_of_a_plain_loop(run, prepared, [row["lr"] for row in rows])
        assert [row["loss"] for row in rows] == pytest.approx(expected, abs=2e-4), stage
    options = [word for change in [*CHANGES, "model.bigram.rows=102"] for word in ("--set", change)]
    code, output = launch.pretrain(run, tmp_path / "whole2", *options)
    assert code == 2 and "model.bigram: checkpoint {" in output, output

    checkpoint, end = tmp_path / "whole2" / "checkpoints", Manifest.read(prepared).eod_id
    source = CheckpointSource(checkpoint)
    state = {name: source.read(name) for name in source.shapes}
    ids = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    ids[1, 5] = ids[2, 0] = end
    network, _ = load_live(checkpoint, None, Replicas(0, 1, 0, 1))
    plain = AutoModelForCausalLM.from_config(network.config).eval()
    by_hand = logits_by_hand(plain, state, ids, rows_by_hand(ids, end, ROWS, 3))
    assert torch.allclose(network(input_ids=ids).logits, by_hand, atol=1e-4)
    assert not torch.allclose(plain(input_ids=ids).logits, by_hand, atol=1e-2), "the table does nothing"

    fresh = make_model(read_run(run, CHANGES).model, end)
    InitialWeights(checkpoint).fill(fresh)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())

    with pytest.raises(CheckpointError, match="has a hashed-bigram embedding"):
        export(checkpoint, tmp_path / "export")
    assert not (tmp_path / "export").exists()
