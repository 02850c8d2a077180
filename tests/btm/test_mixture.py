"""Mixed losses against a loop over tokens, and refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mocte_ds.btm.mixture import mixture_losses
from mocte_ds.btm.partition import partition, read_space
from mocte_ds.data import Manifest, validation_batches
from mocte_ds.errors import ConfigError
from tests.btm.conftest import CONTEXT, SOURCES
from tools import btm


def test_losses_are_those_of_a_loop(prepared: Path, tmp_path: Path, dense: Callable) -> None:
    out = tmp_path / "clustered"
    partition(prepared, out, SOURCES, rank=8)
    made = [dense(f"expert{seed}", seed) for seed in range(SOURCES)]
    folders, models = [folder for folder, _ in made], [model for _, model in made]
    alone, mixed, parameters = mixture_losses(out, folders, 3, [0.1, np.inf], [1, 2, SOURCES])
    assert parameters == SOURCES * sum(p.numel() for p in models[0].parameters())
    space, eod, batches = read_space(out), Manifest.read(out).eod_id, validation_batches(out, CONTEXT, 3)
    for domain, (ids, labels) in batches.items():
        with torch.no_grad():
            shares = torch.stack([model(input_ids=ids).logits.softmax(-1) for model in models]).double()
        for number in range(SOURCES):
            found = -shares[number].gather(-1, labels[..., None]).log().mean().item()
            assert alone[number][domain] == pytest.approx(found, abs=1e-5)
        for one in mixed:
            losses = []
            for row in range(len(ids)):
                near = space.contexts(ids[row].numpy(), eod)
                for t in range(CONTEXT):
                    weights = space.weights(near[t][None], one.temperature, one.top_k)[0]
                    together = sum(w * shares[e, row, t] for e, w in enumerate(weights))
                    losses.append(-np.log(together[labels[row, t]].item()))
            assert one.losses[domain] == pytest.approx(np.mean(losses), abs=1e-5)
    assert len({round(one.losses["mean"], 4) for one in mixed}) > 3
    assert mixed[0].losses["mean"] == pytest.approx(np.mean([mixed[0].losses[d] for d in batches]))


def test_the_tool_prints_every_way_and_refuses(
    prepared: Path, tmp_path: Path, dense: Callable, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "clustered"
    partition(prepared, out, 2, rank=8)
    folders = [str(dense(f"expert{seed}", seed)[0]) for seed in range(2)]
    btm.main(["mix", str(out), *folders, "--sequences", "2"])
    told = capsys.readouterr().out
    assert "expert 1" in told and "top 1, temperature 0.1" in told and "top 2, temperature 0.1" in told
    with pytest.raises(ConfigError, match="2 clusters, and 1 models"):
        mixture_losses(out, folders[:1], 2, [0.1], [1])
    with pytest.raises(ConfigError, match="top-k = 3"):
        mixture_losses(out, folders, 2, [0.1], [3])
    with pytest.raises(ConfigError, match="temperature = 0.0"):
        mixture_losses(out, folders, 2, [0.0], [1])
    other = str(dense("other", 5, hf={"max_position_embeddings": 2 * CONTEXT})[0])
    with pytest.raises(ConfigError, match="another longest context"):
        mixture_losses(out, [folders[0], other], 2, [0.1], [1])
