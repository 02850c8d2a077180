"""What is read of a checkpoint's features, and the tables of it, against transformers, numpy and planted sources."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from mocte_ds.errors import CheckpointError, DataError
from mocte_ds.evaluation import features as module
from mocte_ds.evaluation.feature_tables import facts_text, feature_facts, sampling_facts, sampling_text
from mocte_ds.evaluation.features import ATTENTION, FFN, Features, read_features
from tests.evaluation.conftest import CONTEXT


def test_features_are_those_of_the_decoder(network: Any, prepared: Path) -> None:
    read = read_features("checkpoint", prepared, 12, seed=3)
    loader = module.BlendedLoader(prepared, "validation", CONTEXT, 12, 0, 1, 12, 3)
    batch = next(iter(loader))
    assert torch.equal(read.source, batch["domain"]) and read.domains == ["apples", "stones"]
    assert set(read.source.tolist()) == {0, 1}
    with torch.no_grad():
        hidden = network(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
        for number, layer in enumerate(network.model.layers):
            attended = read.rows[f"model.layers.{number}.mlp", ATTENTION]
            fed = read.rows[f"model.layers.{number}.mlp", FFN]
            between = hidden[number] + attended
            assert torch.allclose(fed, layer.post_attention_layernorm(between), atol=1e-4)
            after = between + layer.mlp(fed)
            expected = hidden[number + 1] if number == 0 else None  # the last one has been through the norm
            assert expected is None or torch.allclose(after, expected, atol=1e-4)
            assert float((attended - fed).abs().max()) > 0.1
    assert len(read_features("checkpoint", prepared, 4, attention=False).rows) == 2


def test_a_block_is_read_in_place_of_its_ffn(network: Any, prepared: Path) -> None:
    """An emerged layer beside one that is still dense."""
    before = read_features("checkpoint", prepared, 4).rows

    class MocteBlock(torch.nn.Module):
        def __init__(self, expert: torch.nn.Module) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([expert])

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.experts[0](rows)

    network.model.layers[1].mlp = MocteBlock(network.model.layers[1].mlp)
    after = read_features("checkpoint", prepared, 4).rows
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_refused(network: Any, prepared: Path) -> None:
    with pytest.raises(DataError, match=r"9999 sequences: .* has \d+ of 8 tokens"):
        read_features("checkpoint", prepared, 9999)
    network.config.vocab_size = 100
    with pytest.raises(CheckpointError, match="vocabulary of 290 tokens and the model only 100"):
        read_features("checkpoint", prepared, 4)


def planted(noise: float) -> Features:
    """Two features of 64 sequences of four sources: one that shows them, and one of noise alone."""
    random = np.random.default_rng(0)
    source = np.arange(64) % 4
    centres = 4 * np.linalg.qr(random.standard_normal((12, 4)))[0].T
    shows = centres[source][:, None] + noise * random.standard_normal((64, 20, 12))
    rows = {("a.mlp", FFN): shows + 7, ("a.mlp", ATTENTION): random.standard_normal((64, 20, 12))}
    return Features({k: torch.from_numpy(v).float() for k, v in rows.items()}, torch.from_numpy(source), list("wxyz"))


def test_facts_of_planted_sources() -> None:
    features = planted(0.3)
    shown, noise = feature_facts(features)
    assert (shown["rows"], shown["documents"]) == (1280, 64)
    # Eight clusters of equal size in four sources: each of one source, and no more can be known of them.
    assert shown["purity"] == 1 and shown["nmi"] == pytest.approx(_nmi_of_halves()) and noise["purity"] < 0.7
    assert shown["found"] and shown["clusters"] == 4 and not noise["found"]
    values = np.linalg.eigvalsh(np.cov(features.rows["a.mlp", FFN].reshape(-1, 12).numpy(), rowvar=False, ddof=0))
    assert shown["stable_rank"] == pytest.approx(values.sum() / values[-1], rel=1e-4)
    assert shown["leading"] == pytest.approx(values[-8:].sum() / values.sum(), rel=1e-4)
    assert shown["effective_rank"] < 4.5 < 11 < noise["effective_rank"]
    assert shown["certificate"][2] < 0.1 and shown["certified_rank"] >= 3
    assert facts_text([shown, noise]).splitlines()[1].startswith("a.mlp  FFN's input ")


def _nmi_of_halves() -> float:
    source = np.arange(64) % 4
    return float(normalized_mutual_info_score(source, source + 4 * (np.arange(64) // 32)))


def test_samples_by_row_follow_theory_and_those_by_sequence_are_further_off() -> None:
    features = planted(1.5)
    facts = sampling_facts(Features({("a.mlp", FFN): features.rows["a.mlp", FFN]}, features.source, []), (160, 640), 12)
    assert len(facts) == 8 * 2 * 2
    three = {(f["drawn"], f["rows"]): f for f in facts if f["rank"] == 3}
    assert all(f["gap"] > 0.5 for f in three.values())
    few, many = three["rows", 160], three["rows", 640]
    assert many["sine"] < 0.65 * few["sine"] and few["worst"] >= few["sine"]
    for fact in (few, many):
        assert 0.3 < fact["sine"] / fact["first_order"] < 1.1  # one of the angles of which this is the sum
        assert 0.35 < fact["sine_over_certificate"] < 0.75  # a half: two halves of half the rows
    for fact in facts:
        assert fact["sine"] <= fact["davis_kahan"] + 1e-6
        assert fact["worst"] <= 1 and fact["expected_deviation"] > 0
    # Where each sequence has a direction of its own, 160 rows of eight of them say less than 160 of many.
    own = torch.from_numpy(np.random.default_rng(1).standard_normal((64, 1, 12))).float()
    mixed = Features({("a.mlp", FFN): features.rows["a.mlp", FFN] + own}, features.source, [])
    found = {f["drawn"]: f["sine"] for f in sampling_facts(mixed, (160,), 12) if f["rank"] == 3}
    assert found["sequences"] > 1.5 * found["rows"]
    text = sampling_text(facts)
    assert "a.mlp, FFN's input: 3 directions" in text and "8 directions" in text
