"""accelerate by itself: with its own accumulation every sequence is numbered once, and can be sampled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mocte_ds
from mocte_ds.errors import MocteError
from mocte_ds.spectrum.sample import hash_keys
from tests.engine import runs
from tests.integrations import trainer_runs
from tests.spawn import spawn

RANKS, STEPS = 2, 3
SEQUENCES = RANKS * trainer_runs.MICRO * trainer_runs.TURNS * STEPS


def accumulate(stage: int, folder: str) -> dict[str, Any]:
    """Three optimizer steps of two micro-batches under Accelerator.accumulate, what the blocks knew of each; then
    three more, twice from the same saved state."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DummyOptim

    mocte_ds.install()
    PartialState(cpu=True)
    config = trainer_runs.config(stage, trainer_runs.OPTIMIZER, total_steps=100)  # the first check is after step 10
    # Room for every document, so that chance does not decide whether one is sampled.
    config["mocte"]["spectrum"] = {"rank": 4, "rows": 4096, "documents": SEQUENCES, "doublings": 0}
    config["gradient_clipping"] = 1.0
    plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_accumulation_steps=trainer_runs.TURNS)
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=trainer_runs.TURNS)
    model, data = runs.model(), [row["input_ids"] for row in trainer_runs.rows(SEQUENCES)]
    loader = torch.utils.data.DataLoader(data, batch_size=trainer_runs.MICRO)
    optimizer = DummyOptim(model.parameters(), lr=1e-3)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch() -> list[float]:
        losses = []
        for ids in loader:
            with accelerator.accumulate(engine):
                loss = engine(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    epoch()
    mocte_ds.uninstall()
    stream = engine.mocte.run.samples.stream
    found = {
        "steps": engine.global_steps,
        "sequences": engine.mocte.passes.sequences,
        "tokens": engine.tokens_seen,
        "documents": stream.documents.keys,
        "sampled": dict(zip(stream.tokens.keys.tolist(), stream.token_facts.rows()[:, 0].tolist(), strict=True)),
        "seed": engine.mocte.config.seed,
    }
    accelerator.save_state(folder)
    engine.mocte.emerge(0)
    found["once"] = epoch()
    accelerator.load_state(folder)
    found["modes"] = [str(block.mode) for block in engine.mocte.blocks]
    engine.mocte.emerge(0)
    found["again"] = epoch()
    bare = accelerator.unwrap_model(engine)
    found["refused"] = [
        refusal(lambda: accelerator.save_model(engine, f"{folder}/model")),
        refusal(lambda: accelerator.save_model(bare, f"{folder}/model")),
        refusal(lambda: accelerator.get_state_dict(engine)),
        refusal(lambda: bare.save_pretrained(f"{folder}/model", state_dict=bare.state_dict())),
        refusal(lambda: bare.model.save_pretrained(f"{folder}/model")),
    ]
    other = torch.nn.Linear(2, 2)
    found["other"] = sorted(accelerator.get_state_dict(other))
    return found


def refusal(save: Callable[[], object]) -> str:
    """The error of a way to save that would lose experts."""
    try:
        save()
    except MocteError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("stage", [1, 2])
def test_every_token_is_sampled_in_its_place(tmp_path: Path, stage: int) -> None:
    ranks = spawn(accumulate, RANKS, stage, str(tmp_path / "state"), timeout=240, deepspeed=True)
    for found in ranks:
        assert found["steps"] == STEPS and found["sequences"] == SEQUENCES
        assert found["tokens"] == SEQUENCES * runs.LENGTH
        assert len(found["sampled"]) == SEQUENCES * runs.LENGTH // RANKS
        assert all("engine.mocte.export(FOLDER)" in text for text in found["refused"]), found["refused"]
        assert found["other"] == ["bias", "weight"], "a model without blocks is accelerate's"
        assert found["modes"] == ["warmup"] * 2 and found["again"] == found["once"]
    expected = {}
    places = torch.arange(runs.LENGTH)
    for number, row in enumerate(trainer_runs.rows(SEQUENCES)):
        keys = hash_keys(torch.tensor(number), places, ranks[0]["seed"])
        expected |= dict(zip(keys.tolist(), row["input_ids"].tolist(), strict=True))
    assert ranks[0]["sampled"] | ranks[1]["sampled"] == expected
    assert not (tmp_path / "state" / "model").exists()
    assert len(torch.cat([found["documents"] for found in ranks]).unique()) == SEQUENCES
